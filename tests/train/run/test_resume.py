"""A resumed run equals one that never stopped; other settings are refused."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train import TrainStep, cli, load_run
from esper_train.base.stop import StopRequest
from esper_train.run import checkpoint
from esper_train.run.checkpoint import load, saved
from esper_train.run.directory import read_metrics
from esper_train.run.report import write_report
from tests.helpers.growing_run import reported, resume, start
from tests.helpers.stopped import contents, stopped_after

pytestmark = pytest.mark.usefixtures("without_pictures")


def slot_stages(directory: Path, epoch: int) -> set[str]:
    state = load(directory / "checkpoints" / f"epoch-{epoch}.pt")
    return {slot["stage"] for slot in state["parts"]["episode"]["slots"]}


# epoch: what the checkpoint finds in the slots
@pytest.mark.parametrize(
    ("epoch", "stages"),
    [
        (2, {"TRAINING"}),
        (6, {"BLENDING"}),
        (8, {"PROBATIONARY"}),
        (10, {"EMBARGOED"}),
        (20, {"FOSSILIZED"}),
    ],
)
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(
    epoch: int, stages: set[str], whole: Path, tmp_path: Path
) -> None:
    directory = stopped_after(epoch, whole, tmp_path / "run")
    assert stages <= slot_stages(directory, epoch)
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)
    first, second = (
        torch.load(d / "network.pt", weights_only=True)["weights"] for d in (whole, directory)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--optim.kind", "adamw"), ("--task", "synthetic-lm"), ("--task", "digits")]
)
def test_other_optimizers_and_tasks_resume_exactly(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    assert (
        start(
            tmp_path / "a" / "run", "--checkpoint.every", "1", "--checkpoint.keep", "99", *options
        )
        == 0
    )
    for epoch in (1, 7, 13):
        directory = stopped_after(epoch, tmp_path / "a" / "run", tmp_path / str(epoch))
        assert resume(directory) == 0
        assert reported(directory) == reported(tmp_path / "a" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["episode", "model", "optimizers", "tracker", "policy", "random", "streams", "trial", "kept"],
)
def test_every_part_has_its_share(
    part: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If any one part is left out, the run ends differently or is refused, so the comparison above
    would show the loss."""
    # the best network only matters once it is an earlier one
    directory = stopped_after(19 if part == "kept" else 9, whole, tmp_path / "run")
    inner = checkpoint.parts
    monkeypatch.setattr(
        checkpoint, "parts", lambda *a: {k: v for k, v in inner(*a).items() if k != part}
    )
    assert resume(directory) == 2 or reported(directory) != reported(whole)


class AtBatch:
    """Does something in the n-th training batch, and counts those that were finished."""

    def __init__(
        self, number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.begun = self.finished = 0
        inner = TrainStep.__call__

        def wrapped(step: TrainStep, *arguments: Any) -> None:
            self.begun += 1
            if self.begun == number:
                action()
            inner(step, *arguments)
            self.finished += 1

        monkeypatch.setattr(TrainStep, "__call__", wrapped)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_the_batch_finish_and_loses_no_epoch(
    number: signal.Signals, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the second of three batches of epoch 7, while a seed is blended in."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        batches = AtBatch(6 * 3 + 2, lambda: signal.raise_signal(number), patch)
        assert start(tmp_path / "run") == code
    assert batches.begun == batches.finished == 6 * 3 + 2
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-6.pt"]
    assert read_metrics(tmp_path / "run")[-1]["status"] == "interrupted"
    assert load_run(tmp_path / "run")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def test_the_same_signal_sent_twice_at_once_is_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` signals its child and the child's group."""

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    AtBatch(2, twice, monkeypatch)
    assert start(tmp_path / "run") == 143


def test_under_nohup_the_loss_of_the_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert stop.before("batch") == "batch"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        AtBatch(1, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert start(tmp_path / "run") == 143
    assert saved(tmp_path / "run" / "checkpoints") == []
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def test_episodes_and_baselines_are_resumed_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped in the baseline of the first of two episodes, 2 epochs of 2 batches
    each."""
    common = [
        "heuristic",
        "--task",
        "synthetic",
        "--max-epochs",
        "2",
        "--max-batches",
        "2",
        "--episodes",
        "2",
    ]
    assert cli.main([*common, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        AtBatch(4 + 3, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert cli.main([*common, "--out", str(tmp_path / "run")]) == 143
    assert not (tmp_path / "run" / "episode-2").exists()
    assert cli.main(["heuristic", "--resume", str(tmp_path / "run")]) == 0
    for part in ("episode-1", "episode-1/baseline", "episode-2", "episode-2/baseline"):
        assert reported(tmp_path / "run" / part) == reported(tmp_path / "whole" / part)


def test_a_crash_leaves_the_last_finished_epoch(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise OSError("the storage of the data went away")

    with monkeypatch.context() as patch:
        AtBatch(4 * 3 + 1, crash, patch)
        assert start(tmp_path / "run") == 2
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-4.pt"]
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host.width", "5"), "host.width was None and is 5; a resumed run"),
        (("--slots", "early", "mid"), "slots was ('early', 'mid', 'late') and is ('early', 'mid')"),
        (("--task", "digits"), "task was synthetic and is digits"),
        (("--optim.host-lr", "0.5"), "optim.host_lr was 0.01 and is 0.5; a resumed run"),
        (("--seed", "7"), "seed was 1 and is 7"),
        (("--seed", "7", "--host.width", "5"), "seed was 1 and is 7, host.width was None and is 5"),
        (("--max-epochs", "4"), "20 epochs are done"),
        (("--out", "elsewhere"), "leave out --out"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(
    options: tuple[str, ...], message: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    assert resume(whole, *options) == 2
    assert message in capsys.readouterr().err
    assert contents(whole) == before


def test_another_mode_or_a_directory_without_a_run_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--resume", str(whole)]) == 2
    assert "mode was heuristic and is fit" in capsys.readouterr().err
    assert resume(tmp_path) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_more_epochs_go_on_from_the_end(whole: Path, tmp_path: Path) -> None:
    directory = stopped_after(20, whole, tmp_path / "run")
    assert resume(directory, "--max-epochs", "22") == 0
    lines = reported(directory)
    assert lines[: len(reported(whole)) - 1] == reported(whole)[:-1]
    epochs = [event["epoch"] for event in read_metrics(directory) if event["event"] == "epoch"]
    assert epochs == list(range(1, 23))
    assert json.loads((directory / "config.json").read_text())["max_epochs"] == 22
    assert "22 of 22 epochs" in write_report(directory).read_text()
