"""TensorBoard and Weights & Biases get the run's numbers: stand-ins for both packages record what they are given."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper_train import EventType, RunConfig, TelemetryConfig, TelemetryHub, run_heuristic_episode
from esper_train.telemetry.loggers import logger_makers, numbers
from tests.helpers.scripted import EASY, Recorder, Script, germinate


class Board:
    """Stands in for `SummaryWriter`."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
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


class Wandb:
    """Stands in for the module and for the run that `init` returns."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **given: Any) -> "Wandb":
        self.given = given
        return self

    def log(self, data: dict[str, Any], step: int) -> None:
        assert not self.history or step >= self.history[-1][0]  # the real one drops steps that go back
        self.history.append((step, data))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Board, Wandb, Recorder]:
    """A run whose seed reaches blending, at the level debug, written to both."""
    boards: list[Board] = []

    def writer(directory: str) -> Board:
        boards.append(Board(directory))
        return boards[0]

    wandb, recorder = Wandb(), Recorder()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    telemetry = TelemetryConfig(level="debug", tensorboard=True, wandb=True)
    sinks = [make(tmp_path / "run") for make in logger_makers(telemetry)]
    config = RunConfig(task="synthetic", max_epochs=5, max_batches=2, growth=EASY)
    hub = TelemetryHub([*sinks, recorder], telemetry)
    run_heuristic_episode(config, policy=Script(e1=germinate()), hub=hub)
    hub.close()
    return boards[0], wandb, recorder


def test_tensorboard_gets_curves_and_words(logged: tuple[Board, Wandb, Recorder], tmp_path: Path) -> None:
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
    assert {step for tag, _, step in board.scalars if tag == "norms/host.head.2.bias"} == {1, 2, 3, 4, 5}
    assert [tag for tag, _, _ in board.texts] == [
        "run_started",
        "seed_stage",
        "seed_stage",
        "seed_stage",
        "run_finished",
    ]
    assert (board.unflushed, board.closed) == (0, True)


def test_wandb_gets_config_history_and_summary(logged: tuple[Board, Wandb, Recorder], tmp_path: Path) -> None:
    _, wandb, recorder = logged
    assert wandb.given == {"project": "esper", "mode": "offline", "name": "run", "dir": str(tmp_path / "run")}
    assert wandb.config["task"] == "synthetic"
    losses = [(step, data["train/loss"]) for step, data in wandb.history if "train/loss" in data]
    assert losses == [(event.epoch, event.data["train"]["loss"]) for event in recorder.of(EventType.EPOCH)]
    words = [data["seed_stage/early"] for _, data in wandb.history if "seed_stage/early" in data]
    assert words[0].startswith("early: seed_0 DORMANT -> GERMINATED")
    assert wandb.summary["status"] == "completed"
    assert wandb.summary["test/accuracy"] == recorder.of(EventType.RUN_FINISHED)[0].data["test"]["accuracy"]
    assert wandb.finished


def test_numbers_are_found_by_their_path_and_nothing_else_is() -> None:
    data = {"a": 1, "b": {"c": 2.5, "d": None, "e": True, "f": "x"}, "slots": [{"slot": "mid", "alpha": 0.5}, 7]}
    assert numbers(data) == {"a": 1, "b/c": 2.5, "slots/mid/alpha": 0.5}


def test_nothing_is_imported_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert logger_makers(TelemetryConfig()) == []
    for package in ("wandb", "tensorboard"):
        with pytest.raises(ImportError, match=rf"{package} needs .*esper-kernels\[log\]"):
            logger_makers(TelemetryConfig(**{package: True}))  # type: ignore[arg-type]
