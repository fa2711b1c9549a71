"""The command under torchrun: a process that is killed, and the restart."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from esper_train import HeuristicConfig, RunConfig, load_run, run_fit, run_heuristic_episode
from esper_train.run.directory import METRICS
from tests.helpers.killed_rank import TASK
from tests.helpers.ranks import tables

ROOT = Path(__file__).parents[3]
SETTINGS = RunConfig(max_epochs=6, batch_size=8, seed=5)
GROWING = replace(
    SETTINGS,
    slots=("early", "mid"),
    policy=HeuristicConfig(min_epochs=1, plateau_epochs=0, life_margin=-50),
)
"""A seed germinates after the first epoch."""
SPLITS = ("train", "validation")


def epochs(directory: Path) -> list[Any]:
    """The measurements of each epoch, without the clock."""
    events = map(json.loads, (directory / METRICS).read_text().splitlines())
    return [
        [event["epoch"]]
        + [[event[split][name] for name in ("loss", "correct", "valid")] for split in SPLITS]
        for event in events
        if event["event"] == "epoch"
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "strategy", "options", "alone"),
    [
        ("fit", "ddp", "", partial(run_fit, SETTINGS)),
        (
            "grow",
            "fsdp2",
            "--no-baseline --slots early mid --policy.min-epochs 1 --policy.plateau-epochs 0 "
            "--policy.life-margin=-50 ",
            partial(run_heuristic_episode, GROWING, baseline=False),
        ),
    ],
)
def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(
    command: str, strategy: str, options: str, alone: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    module = f"{shlex.quote(sys.executable)} -m esper_train {command}"
    new = (
        f"{options}--task tests.helpers.killed_rank:TASK --max-epochs 6 --batch-size 8 --seed 5 "
        f"--distributed.strategy {strategy} --checkpoint.every 1 --out {shlex.quote(str(run))}"
    )
    more = "--no-baseline " if command == "grow" else ""
    again = f"{more}--resume {shlex.quote(str(run))} --task tests.helpers.killed_rank:TASK"
    script = (
        f"if [ $TORCHELASTIC_RESTART_COUNT != 0 ]; then exec {module} {again}; "
        f"else exec {module} {new}; fi"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=1", "--no-python", "bash", "-c", script]
    done = subprocess.run(
        torchrun,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "resuming after epoch 3" in done.stdout
    alone(task=tables(33), out=tmp_path / "alone")
    assert (command == "grow") == any(
        name.startswith("seed_slots.early.seed.") for name in load_run(run, task=TASK).state_dict()
    )
    assert len(epochs(run)) == 6
    for found, expected in zip(epochs(run), epochs(tmp_path / "alone"), strict=True):
        assert found[0] == expected[0]
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one[1:] == other[1:]
            assert one[0] == pytest.approx(other[0], rel=1e-9)
