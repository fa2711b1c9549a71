"""Computes a kernel's row of the table from its machine code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sass import count, model
from benchmarks.sass.count import Counts
from benchmarks.sass.kernels import SIZES, Subject
from benchmarks.sass.parse import Instruction, loops, program


@dataclass(frozen=True)
class Pass:
    """A loop that handles elements."""

    counts: Counts
    elements: float  # of a thread and trip; those outside of the row are left out

    def figures(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "instructions": counts.instructions,
            "elements": self.elements,
            "loads": counts.loads,
            "stores": counts.stores,
            "waits": counts.waits,
        }


@dataclass(frozen=True)
class Row:
    """One kernel: the counts of its machine code, and the bounds that a chip sets on its speed."""

    kernel: str
    backend: str
    sm: int
    instructions: float  # per element, all passes together
    purposes: dict[str, float]
    units: dict[str, float]
    passes: list[dict[str, Any]]  # per thread and trip, in the order of the machine code
    bytes_in_flight: float  # per multiprocessor, when a thread waits for them
    barriers: float | None  # per row; None where a program has no loop over rows
    memory_barriers: float | None
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int  # per multiprocessor
    occupancy: float
    clusters: int  # on the chip
    chip: str
    share: float
    bound_by: str


def judge(subject: Subject) -> Row:
    """The row of the table for one kernel."""
    chip = model.CHIPS[subject.sm]
    code = subject.code
    blocks = model.resident_blocks(code.registers, subject.threads, subject.shared_bytes, chip)
    found = passes(subject)
    around = _around(subject, found)
    waits, block_elements = _waits(subject, found, around)
    units = _per_element(found, "units")
    instructions = sum(one.counts.instructions / one.elements for one in found)
    work = model.Work(
        size=SIZES[subject.dtype],
        row=subject.row,
        issued={"issue": instructions, **units},
        passes=sum(bool(one.counts.loads) for one in found),
        writes=subject.writes,
        waits=waits,
        block_elements=block_elements,
        blocks=blocks,
        cluster=subject.cluster,
    )
    bound = model.bound(work, chip)
    rows = subject.rows or 1
    return Row(
        kernel=subject.name,
        backend=subject.backend,
        sm=subject.sm,
        instructions=instructions,
        purposes=_per_element(found, "purposes"),
        units=units,
        passes=[one.figures() for one in found],
        bytes_in_flight=_in_flight(found) * subject.threads * blocks,
        barriers=None if around is None else around.barriers / rows,
        memory_barriers=None if around is None else around.memory_barriers / rows,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=subject.shared_bytes,
        blocks=blocks,
        occupancy=blocks * subject.threads / chip.threads,
        clusters=model.resident_clusters(blocks, subject.cluster, chip),
        chip=chip.name,
        share=bound.share,
        bound_by=bound.by,
    )


def passes(subject: Subject) -> list[Pass]:
    """The loops through which every element goes."""
    graph, size = subject.code.graph, SIZES[subject.dtype]
    if subject.rows and not loops(graph):
        paths = [count.hot_path(*program(graph))]
    elif subject.rows:
        paths = [max((count.hot_path(graph, loop) for loop in loops(graph)), key=len)]
    else:
        paths = [count.hot_path(graph, loop) for loop in count.element_loops(graph, size)]
        if subject.every_dtype:
            paths = _of_dtype(paths, subject)
    if not paths:
        raise ValueError(f"{subject.name} for sm_{subject.sm} has no loop over elements")
    counted = [count.count(path) for path in paths]
    if not subject.rows:  # one without a gradient stores only what rows give
        counted = count.main_loops([one for one in counted if subject.writes or not one.stored])
    return [
        Pass(counts, subject.filled * (subject.elements or count.elements(counts, size)))
        for counts in counted
    ]


def _of_dtype(paths: Sequence[list[Instruction]], subject: Subject) -> list[list[Instruction]]:
    """The shortest of the paths that load this dtype, as a list: the others are for rare values."""
    fitting = [path for path in paths if count.loaded_dtype(path) == subject.dtype]
    return sorted(fitting, key=lambda path: len(path) / count.count(path).loaded)[:1]


def _around(subject: Subject, found: Sequence[Pass]) -> Counts | None:
    """A trip of the loop over rows, apart from its loops over elements."""
    if subject.rows:
        return found[0].counts
    graph, size = subject.code.graph, SIZES[subject.dtype]
    inner = count.element_loops(graph, size)
    loop = count.row_loop(graph, inner)
    if loop is None:
        return None
    shared = subject.cluster > 1 or subject.every_dtype
    return count.count(count.row_path(graph, loop, inner, shared))


def _waits(subject: Subject, found: Sequence[Pass], around: Counts | None) -> tuple[float, float]:
    """The number of times that a block waits for memory, one after the other, and the number of
    elements that it waits for."""
    if subject.rows:
        (one,) = found
        waits = one.counts.waits + one.counts.memory_barriers
        return waits, one.elements * subject.threads
    part = subject.row * subject.teams / subject.cluster
    trips = [max(1, part / (one.elements * subject.threads)) for one in found]
    waits = sum(one.counts.waits * number for one, number in zip(found, trips, strict=True))
    if around is not None:
        waits += around.waits + around.memory_barriers
    return waits, part


def _in_flight(found: Sequence[Pass]) -> float:
    """The bytes per thread that are on their way when it waits, in the loop with the fewest."""
    loading = [one.counts for one in found if one.counts.loads]
    return min((counts.loaded / (counts.waits or 1) for counts in loading), default=0)


def _per_element(found: Sequence[Pass], name: str) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in found:
        for key, number in getattr(one.counts, name).items():
            total[key] += number / one.elements
    return dict(total)
