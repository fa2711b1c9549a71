"""A model of what a GPU could achieve with counted machine code: occupancy, and the share of a
copy's speed.

A roofline: every limit is taken alone, as if everything else overlapped with it perfectly. It is
not calibrated: no figure here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COPY = 0.89  # of the memory's bandwidth, which a large copy reaches; assumed
LATENCY = 700e-9  # seconds from a load to its use on a busy GPU; assumed
CACHED = 0.6  # of the second-level cache, which rows may fill and still be found there; assumed
_REGISTERS = 65536  # of a multiprocessor
_REGISTERS_AT_A_TIME = 256  # per warp
_RESERVED = 1024  # bytes of shared memory that every block has besides its own


@dataclass(frozen=True)
class Chip:
    name: str
    groups: tuple[int, ...]  # multiprocessors of each GPC: a cluster lies within one; assumed
    clock: float  # Hz, the highest
    bandwidth: float  # bytes/s of memory
    cache: int  # bytes, second level
    shared: int  # bytes of a multiprocessor
    shared_of_block: int
    clusters: bool
    lanes: Mapping[str, int]  # threads per cycle and multiprocessor, in each unit
    threads: int = 2048  # of a multiprocessor, at most
    blocks: int = 32

    @property
    def multiprocessors(self) -> int:
        return sum(self.groups)


_LANES = {"issue": 128, "integer": 64, "special": 16, "load/store": 32}
# Sources: NVIDIA's data sheets (A100 80GB SXM, H200 SXM, HGX B200) for memory; the white papers on
# GA100 and GH100 and the CUDA programming guide (technical specifications, throughput of native
# arithmetic instructions) for multiprocessors and units. Clock and cache of the B200 are those that
# its users report.
CHIPS = {
    80: Chip(
        "A100", (16,) * 6 + (12,), 1.41e9, 2.039e12, 40 << 20, 164 << 10, 163 << 10, False,
        {**_LANES, "float": 64, "double": 32},
    ),
    90: Chip(
        "H200", (16,) * 6 + (18,) * 2, 1.98e9, 4.8e12, 50 << 20, 228 << 10, 227 << 10, True,
        {**_LANES, "float": 128, "double": 64},
    ),
    100: Chip(
        "B200", (18,) * 6 + (20,) * 2, 1.965e9, 7.7e12, 126 << 20, 228 << 10, 227 << 10, True,
        {**_LANES, "float": 128, "double": 64},
    ),
}  # fmt: skip
"""The chip for which each architecture is judged."""


def resident_blocks(registers: int, threads: int, shared_bytes: int, chip: Chip) -> int:
    """The number of blocks of a kernel that fit on a multiprocessor."""
    per_warp = -(-registers * 32 // _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
    return min(
        _REGISTERS // (per_warp * (threads // 32)),
        chip.threads // threads,
        chip.shared // (shared_bytes + _RESERVED),
        chip.blocks,
    )


def resident_clusters(blocks: int, cluster: int, chip: Chip) -> int:
    """The number of clusters that fit on the chip, with `blocks` on a multiprocessor."""
    return sum(group * blocks // cluster for group in chip.groups)


@dataclass(frozen=True)
class Work:
    """The work of a kernel and its distribution over a chip."""

    size: int  # bytes of an element
    row: int  # elements
    issued: Mapping[str, float]  # per element, over all passes: instructions in all, and per unit
    passes: int  # over a row
    writes: bool
    waits: float  # of a block one after the other, for the next number of elements
    block_elements: float
    blocks: int  # on a multiprocessor
    cluster: int = 1


@dataclass(frozen=True)
class Bound:
    share: float  # of the speed of a copy or, without writes, of one read
    by: str  # "memory", "latency", "issue", or a unit


def bound(work: Work, chip: Chip) -> Bound:
    """The highest possible speed of a kernel, and what limits it."""
    busy = resident_clusters(work.blocks, work.cluster, chip) * work.cluster / work.blocks
    in_flight = work.row * work.size * busy * work.blocks / work.cluster
    reads = 1 if in_flight <= CACHED * chip.cache else work.passes
    bandwidth = COPY * chip.bandwidth
    seconds = {  # per element
        "memory": work.size * (reads + work.writes) / bandwidth,
        "latency": work.waits * LATENCY / (work.block_elements * work.blocks * busy),
    }
    for unit, number in work.issued.items():
        if unit in chip.lanes:
            seconds[unit] = number / (chip.lanes[unit] * chip.clock * busy)
    slowest = max(seconds, key=lambda name: seconds[name])
    copy = work.size * (1 + work.writes) / bandwidth
    return Bound(copy / seconds[slowest], slowest)
