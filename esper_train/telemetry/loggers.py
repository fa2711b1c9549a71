"""Sinks for TensorBoard and Weights & Biases, optional packages that are imported only on
request."""

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper_train.telemetry.config import TelemetryConfig
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import Sink, describe

CURVES = frozenset({EventType.EPOCH, EventType.LAYER_GRADIENTS})
"""Kinds of event whose numbers are drawn over the epochs; the others are written as text."""


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
        self._writer.flush()  # a killed run loses nothing

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Writes numbers of each epoch as history, the start as config, and the end as summary of a
    wandb run.

    run: what `wandb.init` returned.
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
    """What makes the sinks that a config asks for. `ImportError` here where a package is missing.

    Each takes a run's directory and, where the run is resumed, the number of epochs that are done:
    what was reported of later ones is reported again, and hidden here. None begins a run.
    """
    makers: list[Callable[[Path, int | None], Sink]] = []
    if config.tensorboard:
        board = _imported("torch.utils.tensorboard", "tensorboard")

        def tensorboard_sink(directory: Path, done: int | None) -> Sink:
            # of the epochs to be reported; a run begun anew starts before them
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
    """The name that an event's words go by: no two events of an epoch share one, or the later would
    hide the other."""
    return "/".join(
        [
            event.type.value,
            *(str(event.data[key]) for key in ("slot", "stage") if key in event.data),
        ]
    )


def _wandb_id(directory: Path, *, anew: bool) -> str:
    """The name by which W&B knows a run however often it is resumed; another one where it begins
    anew."""
    path = directory / "wandb" / "run-id.txt"
    if anew or not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex, encoding="ascii")
    return path.read_text(encoding="ascii").strip()


def numbers(data: Mapping[str, Any], where: str = "") -> dict[str, float]:
    """Every number in the data of an event, by its path; in lists, items are named by their
    slot."""
    found: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, (list, tuple)):
            value = {
                item["slot"]: item for item in value if isinstance(item, Mapping) and "slot" in item
            }
        if isinstance(value, Mapping):
            found |= numbers(value, f"{where}{key}/")
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
