"""Signals that end a run: the first lets the batch finish, a second one ends the process at once. `cli` asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Batch = TypeVar("Batch")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal, of this number, asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopRequest:
    """Whether the run has been asked to end."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the signal that asked."""

    def check(self) -> None:
        """Raise `Stopped` if the run is to end."""
        if self.number is not None:
            raise Stopped(self.number)

    def before(self, batch: Batch) -> Batch:
        """The batch, if the run goes on; the place where one batch is finished and the next not begun."""
        self.check()
        return batch


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT (Ctrl-C) and SIGTERM only leave a request. In the main thread only."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each in SIGNALS:  # the system's own way to end a process needs no answer from it
            signal.signal(each, signal.SIG_DFL)

    handlers = {each: signal.signal(each, ask) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
