"""A growing network is captured again for each structure, and for nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train import Decision, EventType, Op, OptimConfig, RunConfig, TelemetryHub, TrainConfig
from esper_train.run.build import build_episode
from esper_train.run.profile import write_profile
from esper_train.train.capture import OTHER_SHAPE, WARMING_UP, Capture
from tests.helpers.scripted import EASY, Recorder, Script, germinate, run_under
from tests.helpers.taped import (
    RATE,
    Tape,
    assert_same,
    everything,
)

GROWING = RunConfig(
    task="synthetic",
    max_epochs=13,
    batch_size=192,  # 1024 rows: five whole batches, and one of 64
    optim=OptimConfig(host_lr=RATE / 4, seed_lr=RATE / 2),
    growth=replace(EASY, on_fossilize="freeze"),
)


Stages = list[tuple[int, str, str]]


def after_moves(stages: Stages, config: RunConfig) -> list[int]:
    """The epochs of which another structure is trained than before."""
    same = ("GERMINATED", "EMBARGOED", "DORMANT")  # no part of their own, or with another move
    return sorted(
        {epoch + 1 for epoch, _, stage in stages if stage not in same} - {config.max_epochs + 1}
    )


def grow(
    config: RunConfig, capture: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], Stages, Tape]:
    """Everything at the end of a run; the line of each epoch; stages; the tape."""
    script = Script(
        e1=germinate("early", blend="gated"),
        e2=germinate("late"),
        e10=Decision(op=Op.FOSSILIZE, slot="early"),
    )
    episode = build_episode(config, slots=("early", "late"))
    recorder = Recorder()
    tape = Tape()
    if capture:  # which the CPU would refuse at once
        episode.config = replace(config, train=replace(config.train, capture=True))
        episode.step.capture = Capture(tape)
    run_under(episode, script, TelemetryHub([recorder]), mode="test")
    lines = [
        {k: v for k, v in e.data.items() if k != "seconds"} for e in recorder.of(EventType.EPOCH)
    ]
    return everything(episode.model, episode.optimizers), lines, recorder.stages(), tape


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_growing_network_is_captured_by_structure_and_not_by_alpha(kind: str) -> None:
    """A gated seed, whose gate has no gradient while the seed is in TRAINING, and a plain one."""
    config = replace(GROWING, optim=replace(GROWING.optim, kind=kind))
    (state, lines, stages, tape), (eager, plain, eager_stages, _) = (
        grow(config, True),
        grow(config, False),
    )
    anew = [
        number
        for number, line in enumerate(lines, start=1)
        if WARMING_UP in line["train"]["not_replayed"]
    ]
    assert anew == [1, *after_moves(stages, config)]
    alphas = [line["slots"][0]["alpha"] for line in lines]
    assert alphas[5] < alphas[6]  # of the epochs 6 and 7
    assert 7 not in anew
    assert tape.records == len(anew)
    for line, other in zip(lines, plain, strict=True):
        done = line["train"].pop("replayed"), line["train"].pop("not_replayed")
        assert done in ((2, {WARMING_UP: 3, OTHER_SHAPE: 1}), (5, {OTHER_SHAPE: 1}))
        for one in (line, other):
            del one["train"]["seconds"]
        assert (other["train"].pop("replayed"), other["train"].pop("not_replayed")) == (0, {})
    assert (repr(lines), stages) == (repr(plain), eager_stages)
    assert_same(state, eager)


def test_a_profile_is_of_steps_that_are_not_captured(tmp_path: Path) -> None:
    assert "| forward |" in write_profile(
        replace(GROWING, train=TrainConfig(capture=True)), (), tmp_path
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_growing_network_on_a_gpu_is_captured_by_structure() -> None:
    config = replace(GROWING, device="cuda", train=TrainConfig(capture=True))
    script = Script(e1=germinate("early", blend="gated"))
    recorder = Recorder()
    run_under(
        build_episode(config, slots=("early",)), script, TelemetryHub([recorder]), mode="test"
    )
    trained = [event.data["train"] for event in recorder.of(EventType.EPOCH)]
    assert {line["replayed"] for line in trained} == {2, 5}
    anew = [number for number, line in enumerate(trained, start=1) if line["replayed"] == 2]
    assert anew == [1, *after_moves(recorder.stages(), config)]
