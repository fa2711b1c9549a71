"""Shared by several benchmarks: timing calls in turn, and the memory that a call needs."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch


def seconds(call: Callable[[], Any]) -> float:
    """The time of one call, the device's work included."""
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def in_turn(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    limit: float,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. No round begins after `limit` seconds; `before` each call
    runs untimed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            times[name].append(seconds(call))
        if time.perf_counter() - began > limit:
            break
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each, to a hundredth of a millisecond."""
    return {name: round(median(found), 5) for name, found in times.items()}


class Others:
    """Watches how much of the machine other processes use, from when this object is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._used = _used_by_others()

    def are_busy(self) -> bool:
        """Whether others have used more than a tenth of a core on average."""
        used = _used_by_others() - self._used
        return used > 0.1 * (time.perf_counter() - self._started)


def _used_by_others() -> float:
    """Seconds that the cores have spent on other processes since the start of the machine, the time
    that its host took from it included."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, words[1:9])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def in_new_process(benchmark: str, *arguments: str) -> Any:
    """The JSON in the last line of a benchmark's output."""
    command = [sys.executable, "-m", "benchmarks", benchmark, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that a call needs at its peak, besides what is in use before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    start = start_of_peak()
    call()
    return (peak_kib() - start) / 2**10


def start_of_peak() -> int:
    """Return unused memory to the system and reset the peak. Returns the memory in use, in KiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def peak_kib() -> int:
    """The most resident memory of this process so far, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def label(shape: str, busy: bool) -> str:
    """A shape as the tables name it."""
    words = shape.replace("bf16:", "bfloat16 ").replace("x", " x ")
    return f"{words} (busy)" if busy else words


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
