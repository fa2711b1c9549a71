"""Sinks for TensorBoard and Weights & Biases, optional packages that are imported only on request."""

import importlib
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
            self._writer.add_text(event.type.value, describe(event), event.epoch)
        self._writer.flush()  # a killed run loses nothing

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Writes numbers of each epoch as history, the start as config, and the end as summary of a wandb run.

    run: what `wandb.init` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, event: Event) -> None:
        if event.type is EventType.RUN_STARTED:
            self._run.config.update(dict(event.data))
        elif event.type is EventType.RUN_FINISHED:
            self._run.summary.update({"status": event.data["status"], **numbers(event.data)})
        else:
            slot = f"/{event.data['slot']}" if "slot" in event.data else ""
            words = {event.type.value + slot: describe(event).strip()}
            self._run.log(numbers(event.data) if event.type in CURVES else words, step=event.epoch)

    def close(self) -> None:
        self._run.finish()


def logger_makers(config: TelemetryConfig) -> list[Callable[[Path], Sink]]:
    """Functions that make the requested sinks for a run directory. `ImportError` if a package is missing."""
    makers: list[Callable[[Path], Sink]] = []
    if config.tensorboard:
        board = _imported("torch.utils.tensorboard", "tensorboard")
        makers.append(lambda directory: TensorBoardSink(board.SummaryWriter(str(directory / "tensorboard"))))
    if config.wandb:
        wandb = _imported("wandb", "wandb")
        options = {"project": "esper", "mode": "offline"}
        makers.append(lambda directory: WandbSink(wandb.init(**options, name=directory.name, dir=str(directory))))
    return makers


def numbers(data: Mapping[str, Any], where: str = "") -> dict[str, float]:
    """Every number in the data of an event, by its path; in lists, items are named by their slot."""
    found: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, (list, tuple)):
            value = {item["slot"]: item for item in value if isinstance(item, Mapping) and "slot" in item}
        if isinstance(value, Mapping):
            found |= numbers(value, f"{where}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{where}{key}"] = value
    return found


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"telemetry.{package} needs the package {package}: pip install 'esper-kernels[log]'"
        raise ImportError(message) from error
