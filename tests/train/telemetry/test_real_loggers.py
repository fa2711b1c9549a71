"""TensorBoard's and Weights & Biases' own packages write and read back what a run reports."""

from pathlib import Path

import pytest

from esper_train import EventType, TelemetryConfig
from esper_train.telemetry.event import Event
from esper_train.telemetry.loggers import logger_makers


def epoch(number: int) -> Event:
    measured = {"loss": 1.0 / number, "accuracy": 50.0}
    data = {
        "max_epochs": 6,
        "train": measured,
        "validation": measured,
        "slots": [{"slot": "early", "stage": "TRAINING", "alpha": 0.25 * number}],
    }
    return Event(type=EventType.EPOCH, epoch=number, data=data)


def stage(number: int, name: str) -> Event:
    data = {
        "slot": "early",
        "stage": name,
        "from": "DORMANT",
        "seed_id": "a",
        "reason": "asked for",
        "contribution": None,
    }
    return Event(type=EventType.SEED_STAGE, epoch=number, data=data)


def write(config: TelemetryConfig, directory: Path, done: int | None, events: list[Event]) -> None:
    directory.mkdir(exist_ok=True)
    for make in logger_makers(config):
        sink = make(directory, done)
        for event in events:
            sink.write(event)
        sink.close()


def test_tensorboard_reads_each_epoch_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    config = TelemetryConfig(tensorboard=True)
    directory = tmp_path / "run"
    write(config, directory, None, [epoch(n) for n in (1, 2, 3, 4, 5)] + [stage(5, "TRAINING")])
    resumed = [epoch(4), stage(4, "TRAINING"), stage(4, "BLENDING"), epoch(5), epoch(6)]
    write(config, directory, 3, resumed)
    found = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    for name, value in (("train/loss", lambda n: 1 / n), ("slots/early/alpha", lambda n: n / 4)):
        scalars = found.Scalars(name)
        assert [each.step for each in scalars] == [1, 2, 3, 4, 5, 6]
        assert [each.value for each in scalars] == pytest.approx([value(n) for n in range(1, 7)])
    words = {tag: found.Tensors(tag) for tag in found.Tags()["tensors"] if "seed_stage" in tag}
    assert sorted(tag.split("/")[2] for tag in words) == ["BLENDING", "TRAINING"]
    assert [told[-1].step for told in words.values()] == [4, 4]


def test_wandb_keeps_one_run_offline_over_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = TelemetryConfig(wandb=True)
    directory = tmp_path / "run"
    write(config, directory, None, [epoch(1), stage(1, "TRAINING"), stage(1, "BLENDING")])
    write(config, directory, 1, [epoch(2)])
    files = sorted((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.stem for file in files}) == 1  # the name is the run's
    records = b"".join(file.read_bytes() for file in files)  # neither compressed nor encrypted
    for name in (b"train/loss", b"early/TRAINING", b"early/BLENDING"):
        assert name in records, name
