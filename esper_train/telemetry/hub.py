"""The hub of a run, which passes each event to every sink. Each run has its own; there is no global
one."""

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from esper_train.base.names import require_type
from esper_train.base.state import PlainState
from esper_train.telemetry.config import TELEMETRY_LEVELS, TelemetryConfig
from esper_train.telemetry.event import LEVELS, LIFECYCLE, Event, EventType
from esper_train.telemetry.sinks import Sink


class TelemetryHub(PlainState):
    """Passes events to sinks. A sink that fails is reported on stderr, closed, and gets no more
    events."""

    STATE = ("_escalated_epochs",)

    def __init__(self, sinks: Iterable[Sink] = (), config: TelemetryConfig | None = None) -> None:
        if not isinstance(sinks, Iterable):
            raise TypeError(f"sinks must be a list of sinks, got {sinks!r}; pass [sink]")
        require_type(config, TelemetryConfig, "config", or_none=True)
        self._sinks: list[Sink] = []
        for sink in sinks:
            self.add(sink)
        self._config = config or TelemetryConfig()
        self._escalated_epochs = 0

    def add(self, sink: Sink) -> None:
        """Write events to this sink too, from the next one on. `TypeError` for what is no sink."""
        if not (callable(getattr(sink, "write", None)) and callable(getattr(sink, "close", None))):
            raise TypeError(
                f"a sink has the methods write(event) and close(), got {sink!r:.80}; write them, "
                "as esper_train.JsonlSink does"
            )
        self._sinks.append(sink)

    def collects(self, kind: EventType) -> bool:
        """Whether an event of this kind would be written now; if not, there is no need to measure
        for it."""
        if not self._sinks:
            return False
        if self._config.lifecycle_only:
            return kind in LIFECYCLE
        if self._config.level == "off":
            return False
        level = "debug" if self._escalated_epochs > 0 else self._config.level
        return TELEMETRY_LEVELS.index(LEVELS.get(kind, "minimal")) <= TELEMETRY_LEVELS.index(level)

    def emit(self, event: Event) -> None:
        """Write the event to every sink, if the level includes it."""
        if self.collects(event.type):
            for sink in tuple(self._sinks):
                self._attempt(sink, partial(sink.write, event))

    def escalate(self, epochs: int | None = None) -> None:
        """Write everything for some epochs, by default the config's number, from the next event on.

        An escalation under way is never shortened.
        """
        asked = self._config.escalation_epochs if epochs is None else epochs
        self._escalated_epochs = max(self._escalated_epochs, asked)

    def tick(self) -> None:
        """End one epoch of an escalation."""
        self._escalated_epochs = max(0, self._escalated_epochs - 1)

    def close(self) -> None:
        """Close every sink; later events go nowhere."""
        for sink in tuple(self._sinks):
            self._attempt(sink, sink.close)
        self._sinks.clear()

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # an error of a sink must not end the training
            with suppress(OSError, ValueError):  # standard error may have failed as well
                print(
                    f"telemetry: {type(sink).__name__} failed and is left out: {error}",
                    file=sys.stderr,
                )
            self._sinks.remove(sink)
            with suppress(Exception):  # the first error has been reported
                sink.close()
