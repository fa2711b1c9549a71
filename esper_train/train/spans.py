"""The parts of a batch's work, for a profiler."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

Span = AbstractContextManager[Any]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """What is entered around each part of the work, once per batch or more often."""

    data: Span
    forward: Span
    loss: Span
    backward: Span
    learners: Span
    statistics: Span
    optimizer: Span
    evaluation: Span

    @classmethod
    def made(cls, make: Callable[[str], Span]) -> "Spans":
        """Spans that `make` gives for the names of the parts, such as
        `torch.profiler.record_function`."""
        return cls(**{part.name: make(part.name) for part in fields(cls)})


def no_spans() -> Spans:
    """Spans that do nothing.

    Each is one reentrant lock, owned by the step, which only one thread enters: it is entered
    without a call of Python code, unlike `contextlib.nullcontext`, of which a batch would make 18.
    """
    nothing = threading.RLock()
    return Spans.made(lambda name: nothing)
