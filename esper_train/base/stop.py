"""Signals that end a run: the first lets the batch finish, a second one ends the process at once. `cli` listens."""

import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end; its number is the argument."""


class StopRequest:
    """Whether a run is to end. Within `with`, in the main thread, Ctrl-C and SIGTERM ask for it."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def before(self, batch: Any) -> Any:
        """The batch itself, or `Stopped`: here one batch is finished and the next not begun."""
        if self._signal is not None:
            raise Stopped(self._signal)
        return batch

    def __enter__(self) -> Self:
        self._handlers = {each: signal.signal(each, self._ask) for each in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for each in SIGNALS:  # the system's own way to end a process needs no answer from it
            signal.signal(each, signal.SIG_DFL)
