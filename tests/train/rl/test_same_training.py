"""A script of actions through a run and through the environment trains the same network; several
hosts in lockstep are in `test_vector`."""

from dataclasses import replace
from functools import cache

import numpy
import pytest
import torch
from torch import Tensor

from esper_train import (
    EventType,
    HostConfig,
    Op,
    RunConfig,
    Splits,
    Task,
    TelemetryHub,
    get_task,
    run_heuristic_episode,
)
from esper_train.config import preset
from esper_train.rl.actions import ActionTable
from esper_train.rl.env import MorphogenesisEnv
from esper_train.rl.policies import Script
from esper_train.train.config import AmpConfig
from tests.helpers.scripted import EASY, Recorder

CASES = [(task, dtype) for task in ("digits", "pysource") for dtype in (None, "bfloat16")]


@cache
def few_held_out(name: str) -> Splits:
    """The data of a task with 40 rows to validate and 40 to test, which are several batches."""
    splits = get_task(name).load()
    validation, test = (
        (inputs[:40], targets[:40]) for inputs, targets in (splits.validation, splits.test)
    )
    return replace(splits, validation=validation, test=test)


def task_of(config: RunConfig) -> Task:
    return replace(get_task(config.task), load=lambda: few_held_out(config.task))


def short(task: str, dtype: str | None) -> RunConfig:
    config = preset(task)
    width, rows = (16, 4) if task == "pysource" else (3, 16)
    return replace(
        config,
        max_epochs=13,
        max_batches=3,
        batch_size=rows,
        evaluation_batch=16,
        host=HostConfig(width=width),
        growth=EASY,
        train=replace(config.train, amp=AmpConfig(dtype=dtype)),  # type: ignore[arg-type]
    )


def a_whole_life(table: ActionTable) -> list[int]:
    """One seed is kept, one is culled, a request is refused, and a seed with a learned gate is on
    its way at the end."""
    found = {name: place for place, name in enumerate(table.names())}
    first = table.blueprints[0]
    second = table.blueprints[1]
    actions = {
        1: f"germinate early {first} linear",
        2: f"germinate mid {second} sigmoid",
        3: "cull mid",
        4: "fossilize late",
        8: "fossilize early",
        9: f"germinate late {second} gated",
    }
    return [found[actions.get(epoch, "wait")] for epoch in range(1, 14)]


def of_slots(recorder: Recorder) -> list[tuple[object, ...]]:
    return [
        (
            event.epoch,
            event.data["train"]["loss"],
            event.data["train"]["accuracy"],
            event.data["validation"]["loss"],
            event.data["validation"]["accuracy"],
            event.data["reward"],
            event.data["refused"],
            [(slot["stage"], slot["alpha"], slot["contribution"]) for slot in event.data["slots"]],
        )
        for event in recorder.of(EventType.EPOCH)
    ]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("task", "dtype"),
    [*CASES[:3], pytest.param(*CASES[3], marks=pytest.mark.slow)],
)
def test_a_script_trains_the_same_through_a_run_and_through_the_environment(
    task: str, dtype: str | None
) -> None:
    blends = ("linear", "sigmoid", "gated")
    config = short(task, dtype)
    config = replace(config, rl=replace(config.rl, blends=blends))
    env = MorphogenesisEnv(config, task=task_of(config))
    actions = a_whole_life(env.table)
    recorder = Recorder()
    run = run_heuristic_episode(
        config,
        task=task_of(config),
        policy=Script(env.table, actions),
        hub=TelemetryHub([recorder]),
    )
    stages = {(slot, stage) for _, slot, stage in recorder.stages()}
    assert {("early", "FOSSILIZED"), ("mid", "CULLED"), ("late", "TRAINING")} <= stages
    assert any(state == ("early", "BLENDING") for state in stages)
    assert [(epoch, op) for epoch, op, _ in run.refused] == [(4, "FOSSILIZE")]

    own = Recorder()
    env.reset()
    env._episode.hub.add(own)  # the first epoch is trained, its line is written by the first step
    torch.rand(5)  # the caller's random numbers have no part in it
    rewards = []
    for action in actions:
        _, reward, over, _, info = env.step(action)
        rewards.append(reward)
        numpy.random.rand(3)
    assert over
    assert info["illegal"] == 1
    assert of_slots(own) == of_slots(recorder)
    assert rewards == list(run.rewards)
    assert rewards[3] == 0.0  # what is refused earns nothing
    assert own.stages() == recorder.stages()
    assert_same_weights(env._episode.model.state_dict(), run.model.state_dict())
    assert info["result"]["accuracy"] == run.test.points
    assert info["result"]["cost"] == run.cost


def test_every_operation_is_in_the_scripts() -> None:
    table = ActionTable(("early", "mid", "late"), ("a", "b"), ("linear", "sigmoid", "gated"))
    assert {table.decisions[action].op for action in a_whole_life(table)} == set(Op)
