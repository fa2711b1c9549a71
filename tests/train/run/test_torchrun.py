"""The command under torchrun: a process that is killed, and the restart."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esper_train import RunConfig, run_fit
from esper_train.run.directory import METRICS
from tests.helpers.ranks import tables

ROOT = Path(__file__).parents[3]
SETTINGS = RunConfig(max_epochs=6, batch_size=8, seed=5)
SPLITS = ("train", "validation")


def epochs(directory: Path) -> list[Any]:
    """What each epoch measured, without the clock."""
    events = map(json.loads, (directory / METRICS).read_text().splitlines())
    return [
        [event["epoch"]]
        + [[event[split][name] for name in ("loss", "correct", "valid")] for split in SPLITS]
        for event in events
        if event["event"] == "epoch"
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    module = f"{shlex.quote(sys.executable)} -m esper_train fit"
    new = (
        "--task tests.helpers.killed_rank:TASK --max-epochs 6 --batch-size 8 --seed 5 "
        f"--distributed.strategy ddp --checkpoint.every 1 --out {shlex.quote(str(run))}"
    )
    again = f"--resume {shlex.quote(str(run))} --task tests.helpers.killed_rank:TASK"
    script = (
        f"if [ $TORCHELASTIC_RESTART_COUNT != 0 ]; then exec {module} {again}; "
        f"else exec {module} {new}; fi"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "--no-python", "bash", "-c", script]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "resuming after epoch 3" in done.stdout
    alone = tmp_path / "alone"
    run_fit(SETTINGS, task=tables(33), out=alone)
    assert len(epochs(run)) == 6
    for found, expected in zip(epochs(run), epochs(alone), strict=True):
        assert found[0] == expected[0]
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one[1:] == other[1:]
            assert one[0] == pytest.approx(other[0], rel=1e-9)
