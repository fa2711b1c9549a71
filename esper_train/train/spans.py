"""The parts of a batch's work, for a profiler."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

Span = AbstractContextManager[Any]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Context managers around each part of the work, entered once per batch or more often."""

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

    Each is one reentrant lock, owned by the step and used by one thread: entering it runs no Python
    code, unlike the 18 `contextlib.nullcontext` that a batch would make.
    """
    nothing = threading.RLock()
    return Spans.made(lambda name: nothing)
