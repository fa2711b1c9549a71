"""Several processes that train one network: what they compute is what one process computes."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_train import RunConfig, TrainConfig, run_fit
from esper_train.run.directory import CHECKPOINTS, METRICS
from esper_train.train.data import Share
from esper_train.train.sources import make_source
from tests.helpers.ranks import (
    CONFIG,
    DDP,
    FITS,
    LIVES,
    SCENARIOS,
    all_scenarios,
    fitted,
    life,
    result_of,
    tables,
    texts,
    together,
)

pytestmark = pytest.mark.timeout(600)  # of all, so that they stay in one process with the fixture
Found = dict[str, list[Any]]
WHOLE_LIFE = [
    (1, "early", "GERMINATED"),
    (2, "mid", "GERMINATED"),
    (3, "mid", "CULLED"),
    (11, "early", "FOSSILIZED"),
    (12, "mid", "GERMINATED"),
    (17, "mid", "CULLED"),
]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=most, atol=most, msg=name)


def assert_same_measures(found: list[Any], expected: list[Any], most: float) -> None:
    """Compare counts exactly, and losses up to `most`."""
    for one, other in zip(found, expected, strict=True):
        for name in ("valid", "correct", "accuracy"):
            assert one[name] == other[name], name
        assert one["loss"] == pytest.approx(other["loss"], rel=most, nan_ok=True)


def assert_same_life(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare weights, measures and events of a run that grew."""
    assert_same_weights(found["weights"], expected["weights"], 1e-9)
    assert_same_measures(found["train"], expected["train"], 1e-9)
    assert_same_measures(found["validation"], expected["validation"], 1e-9)
    for key in ("stages", "kinds", "refused"):
        assert found[key] == expected[key], key
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6, nan_ok=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The findings of the two ranks in each scenario, and the directory that they wrote to."""
    directory = tmp_path_factory.mktemp("ranks")
    first, second = together(2, all_scenarios, directory)
    return {name: [first[name], second[name]] for name in SCENARIOS} | {"directory": [directory]}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVES)
def test_a_life_of_seeds_is_that_of_one_process(name: str, found: Found) -> None:
    make, blueprint = LIVES[name]
    one = result_of(make(), CONFIG, life(blueprint))
    assert set(WHOLE_LIFE) <= set(one["stages"])
    assert (17, "UNDONE") in one["kinds"]
    assert ((13, "ROLLBACK") in one["kinds"]) == (name == "perceptron")
    ranks = found[name]
    for rank in ranks:
        assert_same_life(rank, one)
    assert [rank["decisions"] for rank in ranks] == [one["decisions"], 0]  # rank 0 decides
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_training_is_that_of_one_process(name: str, found: Found) -> None:
    make, config = FITS[name]
    one = fitted(make(), config)
    for rank in found[name]:
        assert_same_weights(rank["weights"], one["weights"], 1e-9)
        assert_same_measures(rank["train"], one["train"], 1e-9)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-6)


@pytest.mark.slow
def test_one_process_and_two_continue_each_others_runs(found: Found) -> None:
    unbroken = result_of(texts(), replace(CONFIG, max_epochs=6), life("lora"))
    for weights in found["continued"]:
        assert_same_weights(weights, unbroken["weights"], 1e-9)
    (directory,) = found["directory"]
    lines = (directory / "grown" / METRICS).read_text().splitlines()
    epochs = [event["epoch"] for event in map(json.loads, lines) if event["event"] == "epoch"]
    assert epochs == [1, 2, 3, 4, 5, 6]  # written once, by rank 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(found: Found) -> None:
    assert found["stopped"] == [{"signal": 15, "steps": 8}] * 2
    (directory,) = found["directory"]
    written = (directory / "stopped" / CHECKPOINTS).glob("*.pt")
    assert [path.name for path in written] == ["epoch-1.pt"]


@pytest.mark.slow
def test_networks_that_differ_end_the_run_by_name(found: Found) -> None:
    for message in found["drifted"]:
        assert "'host.head.bias'" in message
        assert "in 1 of" in message


@pytest.mark.slow
def test_collectives_are_few(found: Found) -> None:
    epochs = 6
    steps = 5 * epochs  # one bucket of gradients each
    for counts in found["counted"]:
        # an epoch: which parameters learn, the meter, whether to stop, the comparison of networks;
        # the test: the last two
        assert counts["all_reduce"] == steps + 4 * epochs + 2
        # an epoch: what rank 0 measured, and its decision; after the last, the test
        assert counts["broadcast_object_list"] == 2 * epochs + 1
        # everything at the start, the new seed, and in each epoch the buffers: all of one dtype
        assert counts["broadcast"] == 1 + 1 + epochs


def test_shares_are_the_whole_batch_in_order() -> None:
    inputs = torch.arange(11.0)[:, None]
    data = inputs, torch.arange(11)
    whole = make_source(data, 4, shuffle=torch.Generator().manual_seed(1))
    shares = [
        make_source(data, 4, shuffle=torch.Generator().manual_seed(1), share=Share(rank, 3))
        for rank in range(3)
    ]
    for _ in range(2):  # epochs
        for batch, *parts in zip(whole, *shares, strict=True):
            assert torch.equal(batch[1], torch.cat([targets for _, targets in parts]))
            assert torch.equal(batch[0], torch.cat([inputs for inputs, _ in parts]))


def test_what_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"needs one process per rank: start the command with"):
        run_fit(replace(CONFIG, distributed=DDP), task=tables())
    with pytest.raises(ValueError, match=r"train\.capture needs distributed\.strategy 'none'"):
        RunConfig(train=TrainConfig(capture=True), distributed=DDP)
    data = torch.zeros(9, 1), torch.zeros(9, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected training data as a pair of tensors"):
        make_source([data], 4, share=Share(0, 2))
    with pytest.raises(ValueError, match="leave a last batch of 1, fewer than the 2 processes"):
        make_source(data, 4, workers=1, share=Share(0, 2))
