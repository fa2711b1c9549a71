"""The destinations of events: lines on a terminal or in a log, and a JSONL file."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from esper_train.telemetry.event import Event, EventType


class Sink(Protocol):
    """Receives the events of a hub, one by one."""

    def write(self, event: Event) -> None:
        """Take an event. If it raises, this sink is closed and left out, and the run goes on."""
        ...

    def close(self) -> None:
        """Called once, after the last event."""
        ...


class JsonlSink:
    """Writes one line of JSON per event, flushed at once, so that a kill loses no event."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115, closed by close()

    def write(self, event: Event) -> None:
        """Append a line."""
        self._file.write(event.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleSink:
    """Writes one plain line per event, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def write(self, event: Event) -> None:
        """Print a line."""
        print(describe(event), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the stream open, because the sink did not open it."""


def describe_epoch(data: Mapping[str, Any]) -> str:
    """The results of an epoch, without its number."""
    train = describe_measures("train", data)
    validation = describe_measures("validation", data)
    return f"{train}  {validation}  {describe_slots(data)}".rstrip()


def describe_measures(name: str, data: Mapping[str, Any]) -> str:
    part = data[name]
    return f"{name} loss {part['loss']:.4f}{_percent(part, ' acc ', '5.2f')}"


def describe_slots(data: Mapping[str, Any]) -> str:
    return " ".join(f"{slot['slot']}:{slot['stage'].lower()}" for slot in data["slots"])


def _percent(part: Mapping[str, Any] | None, label: str, number_format: str) -> str:
    """The accuracy of a split with a label before it, such as " acc 91.50%"; empty if there is
    none."""
    accuracy = None if part is None else part["accuracy"]
    return "" if accuracy is None else f"{label}{accuracy:{number_format}}%"


def describe(event: Event) -> str:
    """One event in one line of words."""
    data = event.data
    epoch = event.epoch
    match event.type:
        case EventType.RUN_STARTED:
            where = f"{data['max_epochs']} epochs on {data['device']} ({data['backend']})"
            run = f"{data['mode']}: task {data['task']}, seed {data['seed']}"
            return f"{run}, {where}, {data['host_parameters']} parameters"
        case EventType.EPOCH:
            return f"epoch {epoch:3d}/{data['max_epochs']}  {describe_epoch(data)}"
        case EventType.SEED_STAGE:
            gain = (
                ""
                if data["contribution"] is None
                else f", contribution {data['contribution']:+.2f} points"
            )
            move = f"{data['from']} -> {data['stage']} ({data['reason']}{gain})"
            return f"  {data['slot']}: {data['seed_id'] or 'slot'} {move}"
        case EventType.LAYER_GRADIENTS:
            largest = max(data["norms"], key=data["norms"].__getitem__)
            return (
                f"  largest gradient of {len(data['norms'])} parameters: {largest} "
                f"{data['norms'][largest]:.3g}"
            )
        case EventType.SNAPSHOT:
            return f"  the state after epoch {epoch} is kept"
        case EventType.SEED_COST:
            own = data["seed"]
            host = data["host"]
            more = ", more than the host" if own > host else ""
            work = f"{data['ratio']:.2f} times the multiply-adds of a step while it trains"
            return f"  {data['slot']}: {data['blueprint']} costs {work}{more}"
        case EventType.RUN_FINISHED:
            accuracy = _percent(data["test"], ", test accuracy ", ".2f")
            counts = f"{data['fossils']} fossilized, {data['parameters']} parameters"
            why = f" ({data['error']})" if data["error"] else ""
            return f"{data['status']}{why}: {counts}{accuracy}, {data['seconds']:.1f} s"
        case _:
            return f"  epoch {epoch}: {data['message']}"
