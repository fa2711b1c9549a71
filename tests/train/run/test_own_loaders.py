"""Loaders of one's own in whole runs: after a kill they go on bit for bit where they have a state,
with a warning where they have none; a signal to every process spares their workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train import cli, run_fit
from esper_train.run.checkpoint import load, saved
from esper_train.run.directory import read_metrics
from tests.helpers import own, own_loaders
from tests.helpers.growing_run import config_file, reported
from tests.helpers.own import CONFIG

ROOT = Path(__file__).parents[3]
PLACE = "tests.helpers.own_loaders"
KILLED_AFTER = 3
MAIN = "import sys; from esper_train.cli import main; sys.exit(main())"
KILL = f"""
import os, signal, sys
from esper_train.cli import main
from esper_train.run.epoch import Epoch

observe = Epoch.observe
def observe_and_die(self, measured):
    signals = observe(self, measured)
    if self._number == {KILLED_AFTER + 1}:  # it was trained, and nothing is reported yet
        os.kill(os.getpid(), signal.SIGKILL)
    return signals
Epoch.observe = observe_and_die
sys.exit(main())
"""


def options(name: str, directory: Path, *more: str) -> list[str]:
    """Epochs of 3 batches, which end within those of the loaders, of 4."""
    settings = ["--task", f"{PLACE}:{name}", "--config", config_file(directory.parent)]
    settings += ["--slots", "early", "mid", "--no-baseline", "--checkpoint.every", "1"]
    return ["heuristic", *settings, "--max-epochs", "7", *more, "--out", str(directory)]


def process(code: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["rows", "rows_by_workers", "stream", "stream_by_workers"])
def test_a_stateful_loader_is_resumed_exactly_after_a_kill(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert cli.main(options(name, whole)) == 0
    with process(KILL, options(name, killed)) as child:
        child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert saved(killed / "checkpoints")[-1].name == f"epoch-{KILLED_AFTER}.pt"
    resume = ["--resume", str(killed), "--no-baseline", "--task", f"{PLACE}:{name}"]
    assert cli.main(["heuristic", *resume]) == 0
    assert reported(killed) == reported(whole)
    ours, theirs = (
        torch.load(d / "network.pt", weights_only=True)["weights"] for d in (killed, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["rows", "stream"])
def test_a_stateful_loader_follows_the_seed_of_the_run_and_nothing_else(
    name: str, tmp_path: Path
) -> None:
    """Random numbers that the caller drew before have no effect, and neither has a directory, whose
    checkpoints ask the loaders of all splits for their state."""
    pytest.importorskip("torchdata.stateful_dataloader")
    train = getattr(own_loaders, name)

    def load() -> Any:
        rows = own_loaders.load("rows", 0).train
        return replace(train.load(), validation=rows, test=rows)

    task = replace(train, load=load)

    def loss(seed: int, out: Path | None = None) -> float:
        torch.manual_seed(time.time_ns() % 2**32)
        return run_fit(replace(CONFIG, seed=seed), task=task, out=out).test.loss

    assert loss(1) == loss(1, tmp_path / "run") != loss(2)


class Unknown:
    """Batches of the table, from a loader that nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        inputs, targets = own.table_data(32)
        return iter(zip(inputs.split(8), targets.split(8), strict=True))


def test_a_loader_without_a_state_is_named_at_the_start_where_resumed_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    task = replace(own.table, load=lambda: replace(own.load_table(), train=Unknown()))
    out = tmp_path / "run"
    run_fit(replace(CONFIG, max_epochs=1), task=task, out=out)
    reason = "Unknown has no state_dict and load_state_dict"
    start = f"a resumed run may get other train batches than this one: {reason}"
    assert f"epoch 0: {start}" in capsys.readouterr().out
    run_fit(replace(CONFIG, max_epochs=2), task=task, out=out, resume=True)
    again = f"resumed, perhaps with other train batches than an unbroken run has: {reason}"
    assert f"epoch 1: {again}" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert f"At the start: {start}" in page
    assert f"After epoch 1: {again}" in page
    run_fit(replace(CONFIG, max_epochs=3), task=task, out=out, resume=True)
    events = [e["epoch"] for e in read_metrics(out) if e["event"] == "inexact_resume"]
    assert events == [0, 1, 2]


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds workers by /proc, which is Linux's"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("plain_by_workers", signal.SIGINT),
        ("plain_by_workers", signal.SIGTERM),
        ("stream_by_workers", signal.SIGINT),
    ],
)
def test_the_workers_of_ones_own_loader_leave_signals_to_the_run(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    if name != "plain_by_workers":
        pytest.importorskip("torchdata.stateful_dataloader")
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    with process(MAIN, options(name, out, "--max-epochs", "500")) as run:
        try:
            while run.poll() is None and not (
                metrics.exists() and metrics.read_bytes().count(b'"event": "epoch"') > 2
            ):
                time.sleep(0.002)
            os.killpg(run.pid, number)
            stderr = run.communicate(timeout=120)[1]
        finally:
            run.kill()
    assert run.returncode == 128 + number, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert not any(word in stderr for word in ("Traceback", "Exception", "died"))
    epochs = sum(event["event"] == "epoch" for event in read_metrics(out))
    newest = saved(out / "checkpoints")[-1]
    assert load(newest)["parts"]["episode"]["epoch"] == epochs
    assert read_metrics(out)[-1]["status"] == "interrupted"
