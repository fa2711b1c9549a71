"""Worker processes that prepare batches: signals are for the run alone, and a worker's death shows
where it matters."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from esper_train.base.stop import SIGNALS

END = object()
GRACE = 1.0
"""Seconds that a dying process may take to be seen as dead once its connections are closed."""


def answered_signals() -> list[signal.Signals]:
    """The signals that this process answers with code of its own."""
    return [each for each in SIGNALS if callable(signal.getsignal(each))]


class GuardedLoader:
    """The batches of a loader whose workers outlive the signals that its own process answers.

    Slurm, systemd, `timeout` and terminals send a signal to every process of a run. The run
    finishes its batch and saves its state, and needs its workers for that; they go when it goes. A
    worker that died is a `ChildProcessError`, raised where a batch is waited for and nowhere else.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._answered = answered_signals()
        self._loader = loader
        self._workers: int = getattr(loader, "num_workers", 0)
        self._processes: list[BaseProcess] = []

    def __iter__(self) -> Iterator[Any]:
        with self._explained():
            batches = self._begin()
        while True:
            with self._explained():
                batch = next(batches, END)
            if batch is END:
                return
            yield batch

    def _begin(self) -> Iterator[Any]:
        """An iterator over an epoch."""
        with self.starting():
            return iter(self._loader)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Inside, the loader may start its workers: with the signals held back, which a process
        inherits."""
        if self._workers == 0:
            yield
            return
        others = active_children()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._answered)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        started = [each for each in active_children() if each not in others]
        self._processes = started or self._processes

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A context for waiting for a batch: an error that a dead worker causes is explained."""
        try:
            with _watched():
                yield
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, ChildProcessError) or not self._has_dead():
                raise
            raise _death(error) from error

    def _has_dead(self) -> bool:
        """Whether a worker is dead, or is found dead in a moment: its connections close before it
        is gone."""
        return bool(connection.wait([each.sentinel for each in self._processes], timeout=GRACE))


class WorkerLoader(GuardedLoader):
    """The items of `data` that `order` yields, in this process or by workers that last over the
    epochs."""

    def __init__(
        self,
        data: Dataset[Any],
        order: Iterable[Any],
        workers: int,
        *,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=partial(_ignore, answered_signals()),
            pin_memory=pin_memory,
            generator=generator,
        )
        super().__init__(loader)


class _Watch:
    """A handler of SIGCHLD that lets the one before it raise only while a batch is waited for.

    torch's own raises wherever the run happens to be: in the middle of saving, for one.
    """

    def __init__(self, inner: Callable[[int, FrameType | None], Any]) -> None:
        self._inner = inner
        self._waiting = self._missed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._check(frame)
        else:
            self._missed = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._waiting = True
        try:
            if self._missed:
                self._missed = False
                self._check(None)
            yield
        finally:
            self._waiting = False

    def _check(self, frame: FrameType | None) -> None:
        try:
            self._inner(signal.SIGCHLD, frame)
        except RuntimeError as error:
            raise _death(error) from error


def _watched() -> AbstractContextManager[None]:
    """A context in which workers may be reported dead: the process's table of signals says by which
    handler."""
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return nullcontext()  # torch asks the workers themselves every few seconds
    if not isinstance(handler, _Watch):
        handler = _Watch(handler)
        signal.signal(signal.SIGCHLD, handler)
    return handler.waiting()


def _ignore(numbers: Iterable[int], worker: int) -> None:
    """Leave these signals, which were held back until now, to the run. Called in a worker at its
    start."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    sys.excepthook = _report_unless_left


def _report_unless_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error that ends a worker, except those of a run that has closed its connections to
    workers: it says itself why."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _death(error: Exception) -> ChildProcessError:
    what = str(error).strip() or type(error).__name__
    advice = (
        "if memory ran out, use fewer workers, or workers=0; --resume goes on from the last "
        "whole epoch"
    )
    return ChildProcessError(f"a process that prepares batches died ({what}); {advice}")
