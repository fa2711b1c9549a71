"""Every command that trains, stopped by a signal at awkward moments: while it is set up, during the
final test, and again when everything is written and only the exit is left."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_train import TrainStep, cli
from esper_train.run import job, run
from esper_train.run.checkpoint import saved
from esper_train.run.directory import read_metrics
from tests.helpers.command import QUICK

PPO = [
    *("--rl.hosts", "2", "--rl.rollout", "4", "--rl.batch", "8", "--rl.passes", "1"),
    *("--rl.evaluate-every", "0", "--rl.evaluations", "1", "--rl.steps", "16"),
]
COMMANDS = {"grow": ["--no-baseline"], "fit": [], "ppo": PPO}


def arguments(command: str, out: Path) -> list[str]:
    return [command, *QUICK, *COMMANDS[command], "--out", str(out)]


AGAIN = """
import atexit, signal, sys
from esper_train import TrainStep, cli
from esper_train.base.stop import StopRequest

train, leave, asked = TrainStep.__call__, StopRequest.__exit__, []

def stopped(step, *arguments):
    if not asked:
        asked.append(signal.raise_signal(signal.SIGTERM))
    train(step, *arguments)

def left(stop, *error):
    leave(stop, *error)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)

TrainStep.__call__, StopRequest.__exit__ = stopped, left
atexit.register(signal.raise_signal, signal.SIGTERM)
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    "command", ["grow", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fit", "ppo"))]
)
def test_signals_after_a_stopped_run_do_not_change_its_exit_code(
    command: str, tmp_path: Path
) -> None:
    """They arrive when the handlers of the run are gone, and while the interpreter exits."""
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, *arguments(command, tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


def interrupt_within(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first call of a function find SIGTERM pending."""
    inner: Callable[..., Any] = getattr(owner, name)
    calls = []

    def interrupted(*positional: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return inner(*positional, **named)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("command", ["grow", "fit"])
def test_a_signal_during_the_set_up_ends_the_run_before_its_first_batch(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    without_pictures: None,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_within(job, "prepare", patch)
        assert cli.main(arguments(command, out)) == 143
    printed = capsys.readouterr()
    assert printed.err == "interrupted\n"
    assert f"stopped; --resume {out} goes on with it" in printed.out
    assert saved(out / "checkpoints") == []
    assert [event["event"] for event in read_metrics(out)] == ["run_started", "run_finished"]
    assert cli.main([command, "--resume", str(out)]) == 0
    assert read_metrics(out)[-1]["status"] == "completed"


@pytest.mark.parametrize("command", ["grow", "fit"])
def test_a_signal_during_the_final_test_loses_no_epoch(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_pictures: None,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_within(run, "launch_evaluation", patch)
        assert cli.main(arguments(command, out)) == 143
    assert read_metrics(out)[-1]["status"] == "interrupted"
    epochs = [event["epoch"] for event in read_metrics(out) if event["event"] == "epoch"]
    assert [path.stem for path in saved(out / "checkpoints")][-1] == f"epoch-{epochs[-1]}"
    assert cli.main([command, "--resume", str(out)]) == 0
    again = [event["epoch"] for event in read_metrics(out) if event["event"] == "epoch"]
    assert again == epochs
    assert read_metrics(out)[-1]["status"] == "completed"


def test_a_stopped_ppo_goes_on_from_its_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is stopped in the second of two updates, in a batch of some host."""
    assert cli.main(arguments("ppo", tmp_path / "whole")) == 0
    inner = TrainStep.__call__
    asked = []

    def stopped(step: TrainStep, *positional: Any) -> None:
        if not asked and (tmp_path / "run" / "checkpoints" / "update-1.pt").exists():
            asked.append(signal.raise_signal(signal.SIGTERM))
        inner(step, *positional)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopped)
        assert cli.main(arguments("ppo", tmp_path / "run")) == 143
    assert capsys.readouterr().err == "interrupted\n"
    assert [path.stem for path in saved(tmp_path / "run" / "checkpoints", "update")] == ["update-1"]
    assert cli.main(["ppo", "--resume", str(tmp_path / "run")]) == 0
    whole, resumed = ((tmp_path / name / "policy.pt").read_bytes() for name in ("whole", "run"))
    assert resumed == whole
