"""TensorBoard and Weights & Biases get the run's numbers: stand-ins for both packages record what
they are given."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper_train import (
    EventType,
    RunConfig,
    TelemetryConfig,
    TelemetryHub,
    cli,
    run_heuristic_episode,
)
from esper_train.telemetry.loggers import logger_makers, numbers
from tests.helpers.scripted import EASY, Recorder, Script, germinate


class Board:
    """Stands in for `SummaryWriter`."""

    def __init__(self, directory: str, purge_step: int | None = None) -> None:
        self.directory = directory
        self.purge_step = purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.unflushed = 0
        self.closed = False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))
        self.unflushed += 1

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))
        self.unflushed += 1

    def flush(self) -> None:
        self.unflushed = 0

    def close(self) -> None:
        self.closed = True


class Config(dict[str, Any]):
    """The real one refuses another value for a key, unless told that it may change."""

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        assert allow_val_change or all(
            self.get(key, value) == value for key, value in values.items()
        )
        super().update(values)


class Wandb:
    """Stands in for the module and for the run that `init` returns."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.config = Config()
        self.summary: dict[str, Any] = {}
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **given: Any) -> "Wandb":
        self.given = given
        return self

    def log(self, data: dict[str, Any], step: int) -> None:
        # the real one drops steps that go back
        assert not self.history or step >= self.history[-1][0]
        self.history.append((step, data))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Board, Wandb, Recorder]:
    """A run whose seed reaches blending, at the level debug, written to both."""
    boards: list[Board] = []

    def writer(directory: str, purge_step: int | None) -> Board:
        boards.append(Board(directory, purge_step))
        return boards[0]

    wandb = Wandb()
    recorder = Recorder()
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    telemetry = TelemetryConfig(level="debug", tensorboard=True, wandb=True)
    (tmp_path / "run").mkdir()
    sinks = [make(tmp_path / "run", None) for make in logger_makers(telemetry)]
    config = RunConfig(task="synthetic", max_epochs=5, max_batches=2, growth=EASY)
    hub = TelemetryHub([*sinks, recorder], telemetry)
    run_heuristic_episode(config, policy=Script(e1=germinate()), hub=hub)
    hub.close()
    return boards[0], wandb, recorder


def test_tensorboard_gets_curves_and_words(
    logged: tuple[Board, Wandb, Recorder], tmp_path: Path
) -> None:
    board, _, recorder = logged
    assert board.directory == str(tmp_path / "run" / "tensorboard")
    for event in recorder.of(EventType.EPOCH):
        expected = {
            "validation/accuracy": event.data["validation"]["accuracy"],
            "grad/groups/host/gradient_norm": event.data["grad"]["groups"]["host"]["gradient_norm"],
            "slots/early/alpha": event.data["slots"][0]["alpha"],
            "reward_parts/rent": event.data["reward_parts"]["rent"],
        }
        for tag, value in expected.items():
            assert (tag, value, event.epoch) in board.scalars
    assert {step for tag, _, step in board.scalars if tag == "norms/host.head.2.bias"} == {
        1,
        2,
        3,
        4,
        5,
    }
    assert [tag for tag, _, _ in board.texts] == [
        "run_started",
        "seed_stage/early/GERMINATED",
        "seed_stage/early/TRAINING",
        "seed_cost/early",
        "seed_stage/early/BLENDING",
        "run_finished",
    ]
    assert (board.unflushed, board.closed) == (0, True)


def test_wandb_gets_config_history_and_summary(
    logged: tuple[Board, Wandb, Recorder], tmp_path: Path
) -> None:
    _, wandb, recorder = logged
    number = (tmp_path / "run" / "wandb" / "run-id.txt").read_text()
    where = {"project": "esper", "mode": "offline", "name": "run", "dir": str(tmp_path / "run")}
    assert wandb.given == where | {"id": number, "resume": "allow"}
    assert wandb.config["task"] == "synthetic"
    losses = [(step, data["train/loss"]) for step, data in wandb.history if "train/loss" in data]
    assert losses == [
        (event.epoch, event.data["train"]["loss"]) for event in recorder.of(EventType.EPOCH)
    ]
    epochs: dict[int, dict[str, Any]] = {}
    for step, data in wandb.history:
        # the real one would keep the later value alone
        assert not epochs.get(step, {}).keys() & data.keys()
        epochs.setdefault(step, {}).update(data)
    assert epochs[1]["seed_stage/early/GERMINATED"].startswith(
        "early: seed_0 DORMANT -> GERMINATED"
    )
    assert epochs[1]["seed_stage/early/TRAINING"].startswith("early: seed_0 GERMINATED -> TRAINING")
    assert wandb.summary["status"] == "completed"
    assert (
        wandb.summary["test/accuracy"]
        == recorder.of(EventType.RUN_FINISHED)[0].data["test"]["accuracy"]
    )
    assert wandb.finished


@pytest.mark.parametrize(("done", "purged"), [(None, None), (0, 0), (4, 5)])
def test_a_resumed_run_hides_in_tensorboard_what_it_reports_again(
    done: int | None, purged: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board)
    )
    (make,) = logger_makers(TelemetryConfig(tensorboard=True))
    assert make(tmp_path, done)._writer.purge_step == purged  # type: ignore[attr-defined]


def test_a_resumed_run_is_the_same_run_in_wandb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers_given = []
    for done in (None, 4, 9, 0):
        wandb = Wandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        (make,) = logger_makers(TelemetryConfig(wandb=True))
        make(tmp_path, done)
        numbers_given.append(wandb.given["id"])
    first, second, third, begun_anew = numbers_given
    assert first == second == third != begun_anew


def test_a_resumed_command_says_how_far_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boards: list[Board] = []

    def writer(directory: str, purge_step: int | None) -> Board:
        boards.append(Board(directory, purge_step))
        return boards[-1]

    monkeypatch.setattr(cli, "write_report", lambda directory: directory)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer)
    )
    run = [
        "--task",
        "synthetic",
        "--max-epochs",
        "2",
        "--max-batches",
        "2",
        "--telemetry.tensorboard",
    ]
    assert cli.main(["fit", *run, "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["fit", "--resume", str(tmp_path / "run"), "--max-epochs", "4"]) == 0
    assert [board.purge_step for board in boards] == [None, 3]
    steps = [step for board in boards for tag, _, step in board.scalars if tag == "train/loss"]
    assert steps == [1, 2, 3, 4]


def test_numbers_are_found_by_their_path_and_nothing_else_is() -> None:
    data = {
        "a": 1,
        "b": {"c": 2.5, "d": None, "e": True, "f": "x"},
        "slots": [{"slot": "mid", "alpha": 0.5}, 7],
    }
    assert numbers(data) == {"a": 1, "b/c": 2.5, "slots/mid/alpha": 0.5}


def test_nothing_is_imported_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert logger_makers(TelemetryConfig()) == []
    for package in ("wandb", "tensorboard"):
        with pytest.raises(ImportError, match=rf"{package} needs .*esper-kernels\[log\]"):
            logger_makers(TelemetryConfig(**{package: True}))  # type: ignore[arg-type]
