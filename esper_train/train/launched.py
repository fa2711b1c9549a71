"""Work that is queued on a device, whose results the host has yet to read.

Whoever launches it decides when to wait: `read` does so for one, `read_together` for several with
one host sync.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from esper_kernels import GradStats, Meter, compute_all

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Launched(Generic[T]):
    """Queued work that will give a T."""

    sources: tuple[Meter | GradStats | Tensor, ...]
    """The device results to read, as `compute_all` takes them."""
    strict: bool
    """Whether targets outside the classes are an `IndexError`."""
    result: Callable[[Sequence[Any]], T]
    """Makes the result from what was read, one value for each source."""

    def read(self) -> T:
        """Wait for the work: the host sync."""
        (found,) = read_together([self])
        return found

    def beside(self: "Launched[A]", other: "Launched[B]") -> "Launched[tuple[A, B]]":
        """This and another as one, to be read together."""
        first = len(self.sources)
        return Launched(
            sources=self.sources + other.sources,
            strict=self.strict or other.strict,
            result=lambda read: (self.result(read[:first]), other.result(read[first:])),
        )


def read_together(launched: Sequence[Launched[T]]) -> list[T]:
    """Wait for all of them with one host sync. They are on one device, and strict if any of them
    is."""
    sources = [source for each in launched for source in each.sources]
    read = compute_all(*sources, strict=any(each.strict for each in launched))
    results = []
    start = 0
    for each in launched:
        end = start + len(each.sources)
        results.append(each.result(read[start:end]))
        start = end
    return results


class Stopwatch:
    """The time that a device takes for the work launched between the making of this object and
    `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._events = [
            torch.cuda.Event(enable_timing=True) for _ in range(2) if device.type == "cuda"
        ]
        if self._events:
            self._events[0].record()
        self._started = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        """The last work is launched."""
        self._seconds = time.perf_counter() - self._started
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """The time between the two, once the results were read."""
        if not self._events:
            return self._seconds
        started, stopped = self._events
        return float(started.elapsed_time(stopped)) / 1e3
