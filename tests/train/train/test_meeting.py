"""Ranks that find each other and say who is missing: threads stand in for processes."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from esper_train.base.stop import Stopped, StopRequest
from esper_train.train import meeting
from esper_train.train.errors import RankLostError
from esper_train.train.meeting import Meeting, meet_in

LOST = RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed")


@pytest.fixture
def store() -> dist.Store:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=30))
    return made


@pytest.fixture
def short_roll_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ROLL_CALL", 0.3)


def met(store: dist.Store, world: int) -> list[Meeting]:
    with ThreadPoolExecutor(world) as pool:
        asked = [
            pool.submit(meet_in, store, rank, world, 30.0, StopRequest()) for rank in range(world)
        ]
        return [each.result() for each in asked]


def ended(each: Meeting, error: BaseException) -> BaseException:
    """The error that a rank raises when `error` ends it."""
    with pytest.raises(type(error)) as caught, each.explained():
        raise error
    return caught.value


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_start_has_keys_of_its_own(store: dist.Store, world: int) -> None:
    for number in range(3):  # the store outlives the processes, as that of torchrun does
        ranks = met(store, world)
        assert [each.rank for each in ranks] == list(range(world))
        assert not ranks[-1].store.check(["address"])
        ranks[0].store.set("address", str(number))
        assert {each.store.get("address") for each in ranks} == {str(number).encode()}


def test_ranks_that_do_not_start_are_named(store: dist.Store) -> None:
    met(store, 4)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(meet_in, store, rank, 4, 1.0, StopRequest()) for rank in (0, 2)]
        for each in asked:
            with pytest.raises(RankLostError, match=r"of 4 ranks, these did not start .*: 1, 3$"):
                each.result()


@pytest.mark.usefixtures("short_roll_call")
def test_rank_0_may_be_missing_too(store: dist.Store) -> None:
    met(store, 2)
    with pytest.raises(RankLostError, match="rank 0 did not start"):
        meet_in(store, 1, 2, 0.2, StopRequest())


def test_a_signal_ends_the_waiting(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "signal", 15)
    for rank in (0, 1):
        with pytest.raises(Stopped):
            meet_in(store, rank, 2, 30.0, StopRequest())


def test_a_rank_that_fails_is_named_with_its_reason(store: dist.Store) -> None:
    ranks = met(store, 3)
    own = KeyError("weights")
    assert ended(ranks[1], own) is own
    for rank in (0, 2):
        with pytest.raises(RankLostError) as caught, ranks[rank].explained():
            raise LOST
        assert "rank 1 on " in str(caught.value)
        assert "failed: KeyError: 'weights'" in str(caught.value)
        assert str(LOST) in str(caught.value)
        assert caught.value.__cause__ is LOST


@pytest.mark.usefixtures("short_roll_call")
def test_ranks_that_do_not_answer_are_named(store: dist.Store) -> None:
    ranks = met(store, 4)

    def lose(each: Meeting) -> None:
        with each.explained():
            raise LOST

    with ThreadPoolExecutor(2) as pool:
        for asked in [pool.submit(lose, ranks[rank]) for rank in (0, 2)]:
            with pytest.raises(RankLostError, match=r"no answer from rank 1 on \S+, rank 3 on"):
                asked.result()


@pytest.mark.usefixtures("short_roll_call")
def test_a_store_that_does_not_answer_means_to_be_cut_off(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = met(store, 2)

    def unreachable(self: Meeting) -> str:
        raise dist.DistNetworkError("no route to host")

    monkeypatch.setattr(Meeting, "_fate_of_others", unreachable)
    with pytest.raises(RankLostError, match="reaches neither"), ranks[1].explained():
        raise LOST


def test_errors_of_the_rank_itself_pass_unchanged(store: dist.Store) -> None:
    (alone,) = met(store, 1)
    for error in (ValueError("x"), RuntimeError("shapes differ"), Stopped(15)):
        assert ended(alone, error) is error
