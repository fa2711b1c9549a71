"""Runs that are killed without warning, at any point, and then resumed."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esper_train.run.checkpoint import FORMAT, load, save, saved
from esper_train.run.directory import read_metrics
from tests.helpers.growing_run import config_file, reported

MAIN = "import sys; from esper_train.cli import main; sys.exit(main())"


def command(directory: Path) -> list[str]:
    """Begins the run, or goes on with it, as whoever starts it again would."""
    begun = (directory / "config.json").exists()
    options = [
        "--config",
        config_file(directory.parent),
        "--checkpoint.every",
        "2",
        "--out",
        str(directory),
    ]
    how = ["--resume", str(directory)] if begun else options
    if not begun and directory.exists():
        shutil.rmtree(directory)  # killed before it had written anything
    return [sys.executable, "-c", MAIN, "heuristic", "--no-baseline", *how]


def launch(directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(6, marks=[pytest.mark.slow, pytest.mark.timeout(400)]),
        pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
)
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(
    wanted: int, tmp_path: Path
) -> None:
    """Each attempt is killed at some moment after it began to report; when one ends first, another
    run begins.

    Nothing depends on the moments: wherever a kill falls, what is on disk can be read and gone on
    from.
    """
    draw = random.Random(0)
    started = time.monotonic()
    with launch(tmp_path / "whole") as process:
        assert process.wait() == 0, process.communicate()[1]
    longest = time.monotonic() - started
    expected = reported(tmp_path / "whole")
    directory = tmp_path / "run"
    kills = 0
    while kills < wanted:
        before = directory.exists() and (directory / "metrics.jsonl").exists()
        seen = (directory / "metrics.jsonl").stat().st_mtime_ns if before else 0
        with launch(directory) as process:
            while process.poll() is None:
                if (directory / "metrics.jsonl").exists() and (
                    directory / "metrics.jsonl"
                ).stat().st_mtime_ns > seen:
                    break
                time.sleep(0.01)
            try:
                process.wait(draw.uniform(0, longest / 4))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            stderr = process.communicate()[1]
        assert "Traceback" not in stderr
        for path in saved(directory / "checkpoints"):
            assert load(path)["parts"]["episode"]["epoch"] == int(path.stem.removeprefix("epoch-"))
        if process.returncode == 0:
            assert reported(directory) == expected
            shutil.rmtree(directory)
        else:
            assert process.returncode == -9
            assert kills <= wanted
    while directory.exists():
        with launch(directory) as process:
            assert process.wait() == 0, process.communicate()[1]
        assert reported(directory) == expected
        shutil.rmtree(directory)


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    """Both are raised within one batch; the process is ended by the second, before the batch is
    over."""
    code = """
import signal, sys, time
from esper_train import TrainStep, cli
from esper_train.base.stop import ECHO
inner, begun = TrainStep.__call__, []
def twice(step, *arguments):
    begun.append(None)
    if len(begun) == 5:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1.1 * ECHO)
        signal.raise_signal(signal.SIGTERM)
        print("the batch went on", flush=True)
    inner(step, *arguments)
TrainStep.__call__ = twice
sys.exit(cli.main(sys.argv[1:]))
"""
    arguments = command(tmp_path / "run")[3:]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -15
    assert "the batch went on" not in done.stdout
    assert read_metrics(tmp_path / "run")[-1]["event"] == "epoch"


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from esper_train.run.checkpoint import save

directory, data = Path(sys.argv[1]), bytes(200_000)

def child(moment):
    calls = 0
    def at_moment(owner, name, partly=False):
        inner = getattr(owner, name)
        def wrapped(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **keywords)
        setattr(owner, name, wrapped)
    at_moment(os, "fsync")
    at_moment(os, "open")
    at_moment(os, "close")
    at_moment(Path, "open")
    at_moment(Path, "replace")
    save(directory / "epoch-2.pt", data)

moment = 0
while True:
    moment += 1
    pid = os.fork()
    if pid == 0:
        child(moment)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    names = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
    print(os.WTERMSIG(status), *names, flush=True)
    for path in directory.glob("epoch-2*"):
        path.unlink()
    if status == 0:
        break
"""


def test_killed_at_each_step_of_a_save_no_checkpoint_is_lost_or_half_there(tmp_path: Path) -> None:
    """A child process is killed before each system call of a save."""
    state = {"format": FORMAT, "run": {}, "parts": {"weights": torch.zeros(3)}}
    torch.save(state, tmp_path / "made.pt")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    save(directory / "epoch-1.pt", (tmp_path / "made.pt").read_bytes())
    kept = ["epoch-1.pt", "epoch-1.pt.sha256"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(directory)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["9"] * (len(lines) - 1) + ["0"]
    assert len(lines) > 10
    seen = [line[1:] for line in lines]
    whole = [*kept, "epoch-2.pt", "epoch-2.pt.sha256"]
    steps = [kept, [*kept, "epoch-2.pt.sha256"], whole]
    assert all(names in steps for names in seen)
    assert [steps.index(names) for names in seen] == sorted(steps.index(names) for names in seen)
    assert seen[-1] == whole
    assert not list(directory.glob(".*"))  # the next save overwrites what a kill left
    assert load(directory / "epoch-1.pt")["parts"]["weights"].tolist() == [0, 0, 0]
