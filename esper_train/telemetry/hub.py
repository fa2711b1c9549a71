"""The hub of one run: hands each event to every sink. Owned by the run; there is no global one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from esper_train.config import TelemetryConfig
from esper_train.telemetry.events import Event
from esper_train.telemetry.sinks import Sink


class TelemetryHub:
    """Fans events out. A sink that fails is reported on stderr once and left out from then on."""

    def __init__(self, sinks: Iterable[Sink] = (), config: TelemetryConfig | None = None) -> None:
        self._sinks = list(sinks)
        self._enabled = (config or TelemetryConfig()).level != "off"

    def emit(self, event: Event) -> None:
        """Write the event to every sink, unless the level is off."""
        if self._enabled:
            for sink in tuple(self._sinks):
                self._attempt(sink, partial(sink.write, event))

    def close(self) -> None:
        """Close every sink."""
        for sink in tuple(self._sinks):
            self._attempt(sink, sink.close)
        self._sinks.clear()

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # any fault of a sink must not end the training it reports on
            print(f"telemetry: {type(sink).__name__} failed and is left out: {error}", file=sys.stderr)
            self._sinks.remove(sink)
            with suppress(Exception):  # it has been reported
                sink.close()
