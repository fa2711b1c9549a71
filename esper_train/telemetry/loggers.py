"""Sinks for TensorBoard and Weights & Biases, which are imported only if the config asks."""

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper_train.telemetry.config import TelemetryConfig
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import Sink, describe

CURVES = frozenset({EventType.EPOCH, EventType.LAYER_GRADIENTS})
"""Kinds of event whose numbers become curves over the epochs; the others are written as text."""


class TensorBoardSink:
    """Writes numbers of each epoch as scalars, and other events as text, to a `SummaryWriter`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, event: Event) -> None:
        if event.type in CURVES:
            for name, value in numbers(event.data).items():
                self._writer.add_scalar(name, value, event.epoch)
        else:
            self._writer.add_text(words_name(event), describe(event), event.epoch)
        self._writer.flush()  # so that no event is lost when the process is killed

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Writes each epoch's numbers as the history of a wandb run, its start as the config, and its
    end as the summary.

    `run` is what `wandb.init` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, event: Event) -> None:
        if event.type is EventType.RUN_STARTED:
            self._run.config.update(dict(event.data), allow_val_change=True)
        elif event.type is EventType.RUN_FINISHED:
            self._run.summary.update({"status": event.data["status"], **numbers(event.data)})
        else:
            words = {words_name(event): describe(event).strip()}
            self._run.log(numbers(event.data) if event.type in CURVES else words, step=event.epoch)

    def close(self) -> None:
        self._run.finish()


def logger_makers(config: TelemetryConfig) -> list[Callable[[Path, int | None], Sink]]:
    """The functions that make the sinks that a config asks for.

    Each takes a run's directory and the number of epochs done: None for a new run. A resumed run
    reports later epochs again, and their old records are hidden. Raises `ImportError` if a package
    is missing.
    """
    makers: list[Callable[[Path, int | None], Sink]] = []
    if config.tensorboard:
        board = _imported("torch.utils.tensorboard", "tensorboard")

        def tensorboard_sink(directory: Path, done: int | None) -> Sink:
            # first epoch that is reported again; None or 0 where there is no earlier record
            first = done + 1 if done else done
            return TensorBoardSink(
                board.SummaryWriter(str(directory / "tensorboard"), purge_step=first)
            )

        makers.append(tensorboard_sink)
    if config.wandb:
        wandb = _imported("wandb", "wandb")

        def wandb_sink(directory: Path, done: int | None) -> Sink:
            where = {
                "project": "esper",
                "mode": "offline",
                "name": directory.name,
                "dir": str(directory),
            }
            return WandbSink(
                wandb.init(**where, id=_wandb_id(directory, anew=not done), resume="allow")
            )

        makers.append(wandb_sink)
    return makers


def words_name(event: Event) -> str:
    """A name for an event's text that no other event of its epoch has: the later one would hide
    it."""
    return "/".join(
        [
            event.type.value,
            *(str(event.data[key]) for key in ("slot", "stage") if key in event.data),
        ]
    )


def _wandb_id(directory: Path, *, anew: bool) -> str:
    """The id of the run at W&B, which a resumed run keeps; a new run gets a new one."""
    path = directory / "wandb" / "run-id.txt"
    if anew or not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex, encoding="ascii")
    return path.read_text(encoding="ascii").strip()


def numbers(data: Mapping[str, Any], where: str = "") -> dict[str, float]:
    """Every number in the data of an event, by its path; items of a list are named by their
    slot."""
    found: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{where}{key}/")
        elif isinstance(value, (list, tuple)):
            items = [item for item in value if isinstance(item, Mapping) and "slot" in item]
            found |= numbers({item["slot"]: item for item in items}, f"{where}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{where}{key}"] = value
    return found


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = (
            f"telemetry.{package} needs the package {package}: pip install 'esper-kernels[log]'"
        )
        raise ImportError(message) from error
