"""Measurements of the GPU benchmark: device and host times, launches, host syncs, and a copy's
bandwidth.

`inputs` are taken in turn: call n gets the n-th of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from esper_train.train.capture import CudaGraphs

ROUNDS = 15


def device_milliseconds(call: Callable[[Any], Any], inputs: Sequence[Any], repeats: int) -> float:
    """Mean time of a call, between two events on the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for number in range(repeats):
        call(inputs[number % len(inputs)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def replayed_milliseconds(call: Callable[[Any], Any], inputs: Sequence[Any], repeats: int) -> float:
    """Mean time of a call in a CUDA graph of `repeats` calls, so without the host's time."""

    def work() -> None:
        for number in range(repeats):
            call(inputs[number % len(inputs)])

    replay = CudaGraphs(torch.device("cuda")).record(work)
    return (
        median(device_milliseconds(lambda _: replay(), [None], 1) for _ in range(ROUNDS)) / repeats
    )


def host_microseconds(
    call: Callable[[Any], Any], inputs: Sequence[Any], repeats: int = 10
) -> float:
    """Time for which one call occupies the host, while the device still works on earlier ones."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(repeats):
        call(inputs[number % len(inputs)])
    return (time.perf_counter() - started) / repeats * 1e6


def syncs(call: Callable[[], Any]) -> int:
    """The number of times that one call makes the host wait, as reported by torch."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def launches(call: Callable[[], Any]) -> int:
    """Kernels that one call launches, without copies and fills of memory."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [
        event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes read and written per second when 1 GiB is copied."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return (
        2
        * size
        / median(device_milliseconds(target.copy_, [source], 5) for _ in range(ROUNDS))
        * 1e3
    )
