"""Signals that end a run: the first lets the batch finish, a second one ends the process at once.
`cli` listens."""

import signal
import time
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; a request of the system; a terminal that is gone."""
ECHO = 0.5
"""Seconds in which the same request may arrive twice: `timeout` signals both its child and the
group of it."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end; its number is the argument."""


class StopRequest:
    """Whether a run is to end. Within `with`, in the main thread, `SIGNALS` ask for it.

    `ends_process` says that the process ends after `with`: once it was asked to stop, its exit code
    is decided, so a signal that comes later is ignored.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._signal: int | None = None
        self._asked = 0.0
        self.listening = False

    @property
    def signal(self) -> int | None:
        """The signal that asked, if one did."""
        return self._signal

    def before(self, batch: Any) -> Any:
        """Return the batch, or raise `Stopped` if a signal asked for it: here one batch is
        finished, and the next has not begun."""
        if self._signal is not None:
            raise Stopped(self._signal)
        return batch

    def __enter__(self) -> Self:
        # under nohup, the loss of the terminal is to be ignored
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
        self.listening = True
        self._handlers = {n: signal.signal(n, self._ask) for n in SIGNALS if n not in ignored}
        return self

    def __exit__(self, *error: object) -> None:
        self.listening = False
        ignore = self._ends_process and self._signal is not None
        for each, handler in self._handlers.items():
            signal.signal(each, signal.SIG_IGN if ignore else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            self._asked = time.monotonic()
        elif time.monotonic() - self._asked > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
