"""The hub of one run: hands each event to every sink. Owned by the run; there is no global one."""

from __future__ import annotations

import sys
from collections.abc import Iterable

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
        if not self._enabled:
            return
        for sink in tuple(self._sinks):
            try:
                sink.write(event)
            except Exception as error:  # any fault of a sink must not end the training it reports on
                self._sinks.remove(sink)
                print(f"telemetry: {type(sink).__name__} failed and is left out: {error}", file=sys.stderr)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
