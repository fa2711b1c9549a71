"""Hosts in lockstep: each trains as it would alone, and the host waits for the device once a step,
however many there are."""

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from esper_kernels import compute_all
from esper_kernels.testing import SyncCounter
from esper_train import RunConfig, run_heuristic_episode
from esper_train.config import SEED_STEP
from esper_train.control import rewards
from esper_train.rl.policies import Script
from esper_train.rl.vector import MorphogenesisVectorEnv, make_vector
from tests.helpers.episodes import SHORT
from tests.helpers.scripted import EASY
from tests.train.rl.test_same_training import CASES, assert_same_weights, short, task_of

TINY = replace(SHORT, max_epochs=5, max_batches=1, growth=EASY, batch_size=8)
SHAPE = 4
"""Hosts whose scripts differ."""
QUICK = {("digits", None, SHAPE), ("pysource", "bfloat16", 1)}


def germination(vector: MorphogenesisVectorEnv) -> int:
    table = vector.get_attr("table")[0]
    return int(table.names().index(f"germinate early {table.blueprints[0]} sigmoid"))


def scripts(action: int, epochs: int) -> list[list[int]]:
    """Every host germinates a seed, and not all at once."""
    return [
        [action if epoch == host % 3 else 0 for epoch in range(epochs)] for host in range(SHAPE)
    ]


def steps_of(script: list[list[int]], hosts: int) -> numpy.ndarray[Any, Any]:
    """Actions [epochs, hosts]."""
    return numpy.array(script[:hosts]).T


@pytest.mark.parametrize(
    ("task", "dtype", "hosts"),
    [
        # each task, each dtype and each number of hosts; the other combinations are slow
        pytest.param(*case, hosts, marks=[] if (*case, hosts) in QUICK else [pytest.mark.slow])
        for case in CASES
        for hosts in (1, SHAPE)
    ],
)
def test_hosts_in_lockstep_train_as_runs_alone(task: str, dtype: str | None, hosts: int) -> None:
    """The next episode, which begins with the step that ends the first, does too."""
    assert_trains_as_alone(replace(short(task, dtype), max_epochs=5), hosts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_hosts_on_streams_of_their_own_train_as_runs_alone() -> None:
    assert_trains_as_alone(replace(short("digits", None), max_epochs=5, device="cuda"), SHAPE)


def assert_trains_as_alone(config: RunConfig, hosts: int) -> None:
    task = task_of(config)
    vector = MorphogenesisVectorEnv(config, hosts, task=task)
    vector.reset()
    script = scripts(germination(vector), config.max_epochs)
    table = vector.get_attr("table")[0]
    for episode in range(2):
        models = [host._episode.model for host in vector.envs]  # type: ignore[attr-defined]
        found = []
        for actions in steps_of(script, hosts):
            _, earned, terminated, truncated, infos = vector.step(actions)
            found.append(earned.tolist())
        assert terminated.all()
        assert not truncated.any()
        for host in range(hosts):
            seed = config.seed + host + SEED_STEP * episode
            run = run_heuristic_episode(
                replace(config, seed=seed), task=task, policy=Script(table, script[host])
            )
            assert [step[host] for step in found] == list(run.rewards)
            assert infos["final_info"]["result"]["accuracy"][host] == run.test.points
            assert infos["final_info"]["result"]["cost"][host] == run.cost
            assert infos["seed"][host] == seed + SEED_STEP
            assert_same_weights(models[host].state_dict(), run.model.state_dict())


@pytest.mark.parametrize("hosts", [1, SHAPE])
def test_a_step_waits_for_the_device_once_however_many_hosts(
    hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    vector = MorphogenesisVectorEnv(replace(TINY, max_epochs=8), hosts)
    vector.reset()
    assert len(reads) == 1
    counted = 0
    for number, actions in enumerate(steps_of(scripts(germination(vector), 7), hosts)):
        # a trial compares rows that were read before, on the CPU
        trials = any(host._episode.trial.slot for host in vector.envs)  # type: ignore[attr-defined]
        with SyncCounter() as syncs:
            vector.step(actions)
        assert len(reads) == number + 2
        if not trials:
            assert syncs.count == 1
            counted += 1
    assert counted >= 3  # with seeds in training beside their hosts


@pytest.mark.parametrize("hosts", [1, SHAPE])
def test_the_step_that_ends_episodes_reads_their_tests_and_the_next_first_epochs(
    hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    vector = MorphogenesisVectorEnv(replace(TINY, max_epochs=1), hosts)
    vector.reset()
    reads.clear()
    vector.step([0] * hosts)
    assert len(reads) == 2


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of results of each read from now on."""
    reads: list[int] = []

    def counted(*sources: Any, strict: bool) -> tuple[Any, ...]:
        if sources:
            reads.append(len(sources))
        return compute_all(*sources, strict=strict)

    monkeypatch.setattr("esper_train.train.launched.compute_all", counted)
    return reads


def test_it_is_a_vector_environment_of_gymnasium() -> None:
    vector = MorphogenesisVectorEnv(replace(TINY, max_epochs=2), 3)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.observation_space.shape == (3, *vector.single_observation_space.shape)
    recorded = RecordEpisodeStatistics(vector)
    observations, infos = recorded.reset(seed=7)
    assert observations in recorded.observation_space
    assert infos["seed"].tolist() == [7, 8, 9]
    assert recorded.reset(seed=[4, None, 6])[1]["seed"].tolist() == [4, 1008, 6]
    for masks in vector.call("action_masks"):
        assert masks.shape == (vector.single_action_space.n,)  # type: ignore[attr-defined]
    earned = numpy.zeros(3)
    for step in range(2):
        observations, rewards_, terminated, truncated, infos = recorded.step([0, 0, 0])
        earned += rewards_
        assert observations in recorded.observation_space
        assert terminated.tolist() == [step == 1] * 3
        assert not truncated.any()
    assert infos["seed"].tolist() == [1004, 2008, 1006]
    assert numpy.stack(infos["final_obs"]) in recorded.observation_space
    assert infos["final_info"]["episode"]["r"] == pytest.approx(earned)
    vector.close()


def test_stable_baselines3_gets_the_same_hosts() -> None:
    config = replace(TINY, max_epochs=3)
    theirs = make_vector(config, 2)
    ours = MorphogenesisVectorEnv(config, 2)
    assert is_masking_supported(theirs)
    assert numpy.array_equal(theirs.reset(), ours.reset()[0])
    assert numpy.array_equal(get_action_masks(theirs), numpy.stack(ours.call("action_masks")))
    action = germination(ours)
    for actions in ([action, 0], [0, action], [0, 0]):
        seen, earned, dones, infos = theirs.step(numpy.array(actions))
        expected = ours.step(actions)
        assert numpy.array_equal(seen, expected[0])
        assert earned.tolist() == expected[1].astype(numpy.float32).tolist()
        assert dones.tolist() == expected[2].tolist()
    for host, info in enumerate(infos):
        assert numpy.array_equal(info["terminal_observation"], expected[4]["final_obs"][host])
        assert info["episode"]["r"] == expected[4]["final_info"]["episode"]["r"][host]
    theirs.seed(40)
    theirs.reset()
    assert [info["seed"] for info in theirs.reset_infos] == [40, 41]


def test_wrong_actions_are_refused_before_any_host_moves() -> None:
    vector = MorphogenesisVectorEnv(TINY, 2)
    with pytest.raises(RuntimeError, match="no episode under way; call reset"):
        vector.step([0, 0])
    vector.reset()
    before = [host.state_dict() for host in vector.envs]  # type: ignore[attr-defined]
    for actions in ([0, 10_000], [0, 0.5], [0], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"expected an action in \[0, 25\)|argument 2 is"):
            vector.step(actions)
    assert [host.state_dict() for host in vector.envs] == before  # type: ignore[attr-defined]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one host, got 0"):
        MorphogenesisVectorEnv(TINY, 0)
    vector = MorphogenesisVectorEnv(TINY, 2)
    with pytest.raises(ValueError, match="expected no options"):
        vector.reset(options={"reset_mask": numpy.array([True, False])})
    with pytest.raises(ValueError, match="zip"):
        vector.reset(seed=[1])


def test_after_an_error_of_one_host_a_reset_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = MorphogenesisVectorEnv(TINY, 2)
    vector.reset()
    right = rewards.REWARDS["shaped"]
    wrong = {"shaped": lambda *arguments: {"attribution": math.nan}}
    monkeypatch.setattr("esper_train.run.execute.REWARDS", wrong)
    with pytest.raises(ValueError, match="the reward 'shaped' of epoch 1 is nan"):
        vector.step([0, 0])
    monkeypatch.setattr("esper_train.run.execute.REWARDS", {"shaped": right})
    observations, infos = vector.reset(seed=2)
    expected = MorphogenesisVectorEnv(TINY, 2).reset()
    assert numpy.array_equal(observations, expected[0])
    assert infos["seed"].tolist() == expected[1]["seed"].tolist()
    assert vector.step([0, 0])[1].shape == (2,)
