"""The environment: its interface, legal and illegal actions, and what ends an episode."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from esper_train import BadNumbersError, GovernorConfig, RunConfig, TrainConfig, get_task
from esper_train.control import rewards
from esper_train.control.policy import Op
from esper_train.rl.env import FactoredActions, MorphogenesisEnv
from esper_train.rl.observation import RUN_FIELDS, SLOT_FIELDS
from esper_train.tasks import Splits, Task
from tests.helpers.episodes import SHORT
from tests.helpers.scripted import EASY, Planted, not_a_number

TINY = replace(SHORT, max_epochs=8, max_batches=1, growth=EASY, batch_size=8)


def with_rl(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, rl=replace(config.rl, **changes))


@pytest.mark.filterwarnings("ignore:.*WARN")  # it has no rendering
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("check", [check_env, check_env_for_sb3])
def test_checkers_pass(check: Any, factored: bool) -> None:
    env = MorphogenesisEnv(TINY)
    check(FactoredActions(env) if factored else env)


def masked_steps(env: Any, steps: int, seed: int) -> dict[str, int]:
    """The number of times that each operation was chosen in as many random legal steps."""
    draw = numpy.random.default_rng(seed)
    table = env.unwrapped.table
    counts = dict.fromkeys(Op, 0)
    observation, _ = env.reset()
    for _ in range(steps):
        mask = env.action_masks()
        assert mask[0]
        action = int(draw.choice(numpy.flatnonzero(mask)))
        counts[table.decisions[action].op] += 1
        observation, _, over, _, info = env.step(action)
        assert info["illegal"] == 0
        assert env.observation_space.contains(observation)
        if over:
            env.reset()
    return counts


def test_no_masked_step_is_illegal() -> None:
    counts = masked_steps(MorphogenesisEnv(replace(TINY, max_epochs=20)), 120, seed=0)
    assert min(counts.values()) > 0


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(1000, marks=pytest.mark.slow),
        pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_no_masked_step_of_thousands_is_illegal(steps: int) -> None:
    counts = masked_steps(MorphogenesisEnv(replace(TINY, max_epochs=40)), steps, seed=1)
    assert min(counts.values()) > 0


def test_the_mask_says_what_would_be_refused() -> None:
    """Every action at every epoch of a life, in both directions: on a copy of the episode."""
    config = replace(TINY, max_epochs=9, slots=("early", "mid"))
    probe = MorphogenesisEnv(config)
    names = probe.table.names()
    script = [names.index("germinate early conv_light sigmoid"), 0, 0, 0, 0, 0, 0, 0]
    for epoch in range(len(script)):
        for action in (
            0,
            *(names.index(f"{op} {slot}") for op in ("cull", "fossilize") for slot in config.slots),
            names.index("germinate early norm sigmoid"),
        ):
            probe.load_state_dict(
                {"first_seed": 2, "begun": 1, "under_way": True, "actions": script[:epoch]}
            )
            legal = probe.action_masks()[action]
            assert probe.step(action)[4]["refused"] == (not legal), (epoch, names[action])


def test_illegal_actions_are_counted_and_change_nothing() -> None:
    env = MorphogenesisEnv(TINY)
    waiting = MorphogenesisEnv(TINY)
    cull = env.table.names().index("cull early")
    env.reset()
    waiting.reset()
    for step in range(1, 5):
        assert not env.action_masks()[cull]
        seen, reward, _, _, info = env.step(cull)
        expected = waiting.step(0)[0]
        assert (reward, info["illegal"], info["refused"]) == (0.0, step, True)
        assert numpy.array_equal(seen, expected)


def test_factored_actions_are_the_same_actions() -> None:
    env = FactoredActions(MorphogenesisEnv(TINY))
    env.reset()
    table = env.unwrapped.table  # type: ignore[attr-defined]
    sizes = env.action_space.nvec
    assert list(sizes) == [3, 6, 1, 4]
    places = {int(env.action(action)) for action in numpy.ndindex(*sizes)}
    assert places == set(range(len(table)))
    masks = numpy.split(env.action_masks(), numpy.cumsum(sizes)[:-1])
    assert [mask.tolist() for mask in masks] == [
        [True] * 3,
        [True] * 6,
        [True],
        [True, True, False, False],
    ]
    _, _, _, _, info = env.step(numpy.array([1, 3, 0, Op.GERMINATE]))
    assert info["illegal"] == 0
    masks = numpy.split(env.action_masks(), numpy.cumsum(sizes)[:-1])
    assert masks[3].tolist() == [True, True, True, False]
    _, _, _, _, info = env.step(numpy.array([0, 0, 0, Op.CULL]))  # legal factor by factor
    assert info["illegal"] == 1


def test_every_field_has_a_name_and_stays_in_its_range() -> None:
    env = MorphogenesisEnv(TINY)
    ranges = env.observer.ranges()
    assert len({name for name, _, _ in ranges}) == len(ranges) == env.observation_space.shape[0]
    assert len(ranges) == len(RUN_FIELDS) + 3 * (8 + 6 + len(SLOT_FIELDS))
    observation, _ = env.reset()
    found = dict(zip((name for name, _, _ in ranges), observation, strict=True))
    signals = env.signals
    assert signals is not None
    assert found["epochs left"] == pytest.approx(7 / 8)
    assert found["validation accuracy"] == pytest.approx(signals.val_accuracy / 100)
    expected = signals.val_loss / (signals.val_loss + math.log(10))
    assert found["validation loss"] == pytest.approx(expected)
    assert found["early: DORMANT"] == 1.0
    assert found["training cost"] == 0.0
    env.step(env.table.names().index("germinate mid norm sigmoid"))
    observation = env.step(0)[0]
    found = dict(zip((name for name, _, _ in ranges), observation, strict=True))
    assert (found["mid: TRAINING"], found["mid: norm"], found["early: norm"]) == (1.0, 1.0, 0.0)
    assert found["mid: age"] == pytest.approx(2 / 7)
    assert found["mid: potential measured"] == 1.0
    assert 0 < found["training cost"] < 1
    assert 0 < found["parameters added"] < 1


def test_episodes_have_seeds_in_a_row() -> None:
    env = MorphogenesisEnv(TINY)
    assert [env.reset()[1]["seed"] for _ in range(3)] == [2, 1002, 2002]
    assert env.reset(seed=7)[1]["seed"] == 7
    assert env.reset()[1]["seed"] == 1007


def test_a_state_is_trained_again() -> None:
    env = MorphogenesisEnv(TINY)
    env.reset()
    actions = [env.table.names().index("germinate mid norm sigmoid"), 0, 0]
    for action in actions:
        expected = env.step(action)
    again = MorphogenesisEnv(TINY)
    again.load_state_dict(env.state_dict())
    assert again.state_dict() == env.state_dict()
    for _ in range(4):
        expected = env.step(0)
        found = again.step(0)
        assert numpy.array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]


@pytest.mark.parametrize("action", [-1, 10_000, 0.5, math.nan])
def test_what_is_no_action_is_refused(action: float) -> None:
    env = MorphogenesisEnv(TINY)
    env.reset()
    with pytest.raises(ValueError, match=r"expected an action in \[0, 25\)"):
        env.step(action)
    assert env.state_dict()["actions"] == []


def test_a_step_without_an_episode_is_refused() -> None:
    env = MorphogenesisEnv(replace(TINY, max_epochs=1))
    for call in (lambda: env.step(0), env.action_masks):
        with pytest.raises(RuntimeError, match="no episode under way; call reset"):
            call()
    env.reset()
    assert env.step(0)[2]
    with pytest.raises(RuntimeError, match="no episode under way; call reset"):
        env.step(0)


def spoiled(*epochs: int) -> Task:
    """A task whose training inputs are NaN in some epochs."""
    synthetic = get_task("synthetic")
    splits = synthetic.load()
    inputs, targets = splits.train  # type: ignore[misc]

    def load() -> Splits:
        batches = list(zip(inputs.split(32), targets.split(32), strict=True))
        places = [(1 + epoch, 1) for epoch in epochs]  # an example is drawn before the first
        return replace(splits, train=Planted(batches, not_a_number, *places))

    return replace(synthetic, name="spoiled", load=load)


def going_on(policy: str) -> RunConfig:
    return replace(
        TINY,
        train=TrainConfig(on_bad_numbers=policy),
        governor=GovernorConfig(snapshot_epochs=1),  # type: ignore[arg-type]
    )


def steps_until_the_end(env: MorphogenesisEnv) -> tuple[list[float], Mapping[str, Any]]:
    env.reset()
    rewards = []
    while True:
        _, reward, over, _, info = env.step(0)
        rewards.append(reward)
        if over:
            return rewards, info


@pytest.mark.parametrize(
    ("policy", "on_finding"), [("stop", "end"), ("stop", "punish"), ("rollback", "end")]
)
def test_a_finding_ends_the_episode(policy: str, on_finding: str) -> None:
    config = with_rl(going_on(policy), on_finding=on_finding)
    rewards, info = steps_until_the_end(MorphogenesisEnv(config, task=spoiled(4)))
    assert len(rewards) == 3
    assert rewards[-1] == pytest.approx(-10.0, abs=1e-9)
    assert "result" not in info
    assert info["episode"]["r"] == pytest.approx(sum(rewards))


def test_a_finding_costs_and_the_episode_goes_on() -> None:
    config = with_rl(going_on("rollback"), on_finding="punish")
    rewards, info = steps_until_the_end(MorphogenesisEnv(config, task=spoiled(4)))
    assert len(rewards) == 7  # the epoch that was undone had no decision
    assert rewards[2] == pytest.approx(-10.0, abs=1e-9)
    assert "result" in info


def test_a_first_epoch_gone_bad_is_no_episode() -> None:
    env = MorphogenesisEnv(going_on("stop"), task=spoiled(1))
    with pytest.raises(BadNumbersError, match="the losses of the first epoch went bad with seed 2"):
        env.reset()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(0)


def test_an_observation_that_is_not_finite_is_refused_by_name() -> None:
    env = MorphogenesisEnv(going_on("warn"), task=spoiled(3))
    env.reset()
    env.step(0)
    with pytest.raises(ValueError, match="observation of epoch 3 is not finite: training loss is"):
        env.step(0)


def test_a_reward_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**rewards.REWARDS, "shaped": lambda *arguments: {"attribution": math.nan}}
    monkeypatch.setattr("esper_train.run.execute.REWARDS", wrong)
    env = MorphogenesisEnv(TINY)
    env.reset()
    with pytest.raises(ValueError, match="the reward 'shaped' of epoch 1 is nan"):
        env.step(0)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    env = MorphogenesisEnv(TINY)
    env.reset()
    env.step(0)
    assert torch.equal(torch.rand(2), expected)
