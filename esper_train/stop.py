"""Signals that end a run: the first lets the batch finish, a second one ends the process at once. `cli` listens."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Batch = TypeVar("Batch")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end; its number is the argument."""


class StopRequest:
    """Whether the run has been asked to end: `signal` is the number of the signal that asked."""

    signal: int | None = None

    def before(self, batch: Batch) -> Batch:
        """The batch, or `Stopped`: here one batch is finished and the next not begun."""
        if self.signal is not None:
            raise Stopped(self.signal)
        return batch


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, Ctrl-C and SIGTERM only leave a request. For the main thread."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each in SIGNALS:  # the system's own way to end a process needs no answer from it
            signal.signal(each, signal.SIG_DFL)

    handlers = {each: signal.signal(each, ask) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
