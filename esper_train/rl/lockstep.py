"""Work of several hosts on one device, waited for together.

The work of a host is a generator: it queues what the device has to do, yields it where it needs the
results, and goes on with them.
"""

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from esper_train.train.launched import Launched, read_together

T = TypeVar("T")
Work = Generator[Launched[Any], Any, T]
Streams = Sequence[torch.cuda.Stream | None]


def host_streams(device: torch.device, hosts: int) -> Streams:
    """A stream for each host on a CUDA device; None for each on others."""
    return [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(hosts)]


def driven(work: Work[T]) -> T:
    """Do the work of one host."""
    (result,) = in_lockstep([work], [None])
    return result


def in_lockstep(works: Sequence[Work[T]], streams: Streams) -> list[T]:
    """Do the work of every host, each on its stream. In a round, every host goes on to where it
    needs results; then one host sync reads those of all.

    An error of one host is raised, and leaves the others where they are.
    """
    results: dict[int, T] = {}
    read: dict[int, Any] = dict.fromkeys(range(len(works)))
    while read:
        launched: dict[int, Launched[Any]] = {}
        for place, values in read.items():
            stream = streams[place]
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                try:
                    launched[place] = works[place].send(values)
                except StopIteration as end:
                    results[place] = end.value
        for stream in streams:
            if stream is not None:  # the results are read on the caller's stream
                torch.cuda.current_stream(stream.device).wait_stream(stream)
        read = dict(zip(launched, read_together(list(launched.values())), strict=True))
    return [results[place] for place in range(len(works))]
