"""The cost of a path through machine code: instructions by purpose and by unit, accesses to global
memory, and waits for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.sass.parse import (
    Block,
    Instruction,
    Loop,
    Value,
    executed,
    innermost,
    loops,
    path,
)

WIDE = 16  # bytes of the widest access that every chip has
_TRIPS = 24  # around a path, to average its waits; a multiple of the usual numbers of stages
_BYTES = re.compile(r"\.(?:[US](8|16)|(64|128|256))(?=\.|$)")
_BARRIER = re.compile(r"BAR\.(SYNC|RED)|UCGABAR_WAIT")
_REGISTER = re.compile(r"\bR(\d+)")

LOADS = frozenset({"LDG", "LD", "LDGSTS"})
STORES = frozenset({"STG", "ST"})
_SHARED = frozenset({"LDS", "STS"})
_WITHOUT_RESULT = STORES | {"LDGSTS", "STS", "STAS", "RED", "REDG"}

PURPOSES: dict[str, str] = {
    "load and store": r"LD|ST|ATOM|RED(G|S)?\b|SHFL",
    "exponential": r"MUFU",
    "convert": r"F2|I2F|HADD2\.F32|PRMT|IMAD\.(SHL\.)?U32 .* 0x10000,|U?SHF\.L\.U32 .* 0x10,"
    r"|LOP3\.LUT .* 0xffff0000,",
    "rank": r"(PLOP3|P2R|R2P|SEL|VOTE|POPC|REDUX)\b|[FHI]SETP2?\S* .*, !?P\d$",
    "compare": r"[DFH]SETP|FMNMX|FSEL",
    "add and multiply": r"[DFH](ADD|MUL|FMA)",
    "address and control": r"",
}
"""Patterns of the instructions of each purpose, tried in this order. An instruction shows its
purpose only roughly: "rank" stands for those that combine or count the results of compares."""

UNITS: dict[str, str] = {
    "load/store": r"LD[GS]?\b|LDGSTS|ST[GS]?\b|STAS|ATOM|RED(G|S)?\b|SHFL",
    "special": r"MUFU|F2F\b|F2I|I2F\b|POPC|FLO|BREV",
    "double": r"D(ADD|MUL|FMA|SETP)",
    "float": r"F(ADD|MUL|FMA)|IMAD|H(ADD|MUL|FMA)2",
    "none": r"U[A-Z]|R2UR|S2U|B(RA|SSY|SYNC|REAK|AR)\b|EXIT|NOP|\w*(MEM|ERR|DEP)BAR|CALL|RET"
    r"|WARPSYNC",
    "integer": r"",
}
"""Patterns of the opcodes that each unit of a multiprocessor executes, tried in this order.
"integer" also compares, selects, permutes and moves; "none" stands for units that are not
modelled."""


@dataclass(frozen=True)
class Counts:
    """The work of one thread along a path, once."""

    instructions: int
    purposes: dict[str, int]
    units: dict[str, int]
    loads: dict[int, int]  # of global memory: bytes of an access, and how many there are
    stores: dict[int, int]
    waits: float  # for global memory
    barriers: int
    memory_barriers: int

    @property
    def loaded(self) -> int:
        """The number of bytes."""
        return sum(width * number for width, number in self.loads.items())

    @property
    def stored(self) -> int:
        """The number of bytes."""
        return sum(width * number for width, number in self.stores.items())


def count(instructions: Sequence[Instruction]) -> Counts:
    """The counts of a path."""
    return Counts(
        instructions=len(instructions),
        purposes=dict(Counter(map(purpose, instructions))),
        units=dict(Counter(_first(UNITS, i.opcode) for i in instructions)),
        loads=_accesses(instructions, LOADS),
        stores=_accesses(instructions, STORES),
        waits=_waits(instructions),
        barriers=sum(
            bool(re.match(r"BAR\.(SYNC|RED)|UCGABAR_WAIT", i.opcode)) for i in instructions
        ),
        memory_barriers=sum(_is_memory_barrier(i) for i in instructions),
    )


def purpose(instruction: Instruction) -> str:
    """The key of `PURPOSES` to which an instruction belongs."""
    if instruction.guard and instruction.name in ("IADD3", "VIADD"):
        return "rank"
    return _first(PURPOSES, f"{instruction.opcode} {instruction.operands}")


def width(instruction: Instruction) -> int:
    """The bytes per thread of a memory access."""
    bits = _BYTES.search(instruction.opcode)
    return int(bits[1] or bits[2]) // 8 if bits else 4


def _first(patterns: dict[str, str], text: str) -> str:
    return next(name for name, pattern in patterns.items() if re.match(pattern, text))


def _accesses(instructions: Iterable[Instruction], names: frozenset[str]) -> dict[int, int]:
    executed = [i for i in instructions if i.name in names and i.guard != "!PT"]
    wide = {i.guard for i in executed if width(i) >= WIDE and i.guard}
    # The compiler may put both ways of a branch under opposite guards; the path is the wide one.
    found = Counter(
        width(i) for i in executed if width(i) >= WIDE or _opposite(i.guard) not in wide
    )
    return dict(sorted(found.items()))


def _opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def _is_memory_barrier(instruction: Instruction) -> bool:
    """Whether it waits for memory beyond the block."""
    return instruction.name == "MEMBAR" and "CTA" not in instruction.opcode.split(".")


def _waits(instructions: Sequence[Instruction]) -> float:
    """The number of times that a thread waits for global memory on a path, averaged over many
    passes along it.

    It waits at the first instruction that reads what a load in flight will write, or that leaves
    fewer asynchronous copies in flight than there are. By then everything issued before has come.
    """
    pending: set[int] = set()
    groups = found = 0
    for trip in range(2 * _TRIPS):
        for instruction in instructions:
            left = re.search(r"0x(\w+)", instruction.operands)
            behind = instruction.name == "DEPBAR" and left and groups > int(left[1], 16)
            if behind or pending & _read(instruction):
                found += trip >= _TRIPS  # the first ones fill the pipeline
                pending.clear()
                groups = 0
            if instruction.name == "LDGDEPBAR":
                groups += 1
            elif instruction.name in LOADS and instruction.name != "LDGSTS":
                pending |= _written(instruction)
    return found / _TRIPS


def _written(load: Instruction) -> set[int]:
    """The registers of a load's result."""
    first = _REGISTER.match(load.operands)
    return set(_following(int(first[1]), width(load))) if first else set()


def _following(register: int, size: int) -> range:
    return range(register, register + max(1, size // 4))


def _read(instruction: Instruction) -> set[int]:
    """The registers that an instruction reads."""
    result, _, sources = instruction.operands.partition(",")
    if instruction.name in _WITHOUT_RESULT:
        sources = f"{result},{sources}"
    registers = [int(number) for number in _REGISTER.findall(sources)]
    size = 8 if instruction.name.startswith("D") else 4
    found = {r for register in registers for r in _following(register, size)}
    if instruction.name in ("STG", "ST", "STS") and registers:
        found |= set(_following(registers[-1], width(instruction)))
    return found


def element_loops(graph: Sequence[Block], size: int) -> list[Loop]:
    """The innermost loops that stream through elements of `size` bytes: those with 16 byte loads,
    or with exponentials and accesses of single elements."""
    return [loop for loop in innermost(loops(graph)) if _streams(hot_path(graph, loop), size)]


def _streams(instructions: Sequence[Instruction], size: int) -> bool:
    accesses = [i for i in instructions if i.name in LOADS | STORES]
    exponential = any(i.opcode.startswith("MUFU.EX2") for i in instructions)
    return any(width(i) >= WIDE and i.name in LOADS for i in accesses) or (
        exponential and any(width(i) in (size, 4) or width(i) >= WIDE for i in accesses)
    )


def main_loops(found: Sequence[Counts]) -> list[Counts]:
    """The main loops of a kernel: of those that store, and of those that only load, the ones that
    move the most bytes per trip. Loops over the rest of a row, which a main loop leaves over, do
    not count. Where some loops have exponentials, those without read class weights and not
    elements."""

    def moved(one: Counts) -> int:
        return one.loaded + one.stored

    exponential = [one for one in found if one.purposes.get("exponential")] or list(found)
    most = {
        stores: max((moved(one) for one in exponential if bool(one.stored) == stores), default=0)
        for stores in (False, True)
    }
    return [one for one in exponential if moved(one) == most[bool(one.stored)]]


def row_loop(graph: Sequence[Block], inner: Sequence[Loop]) -> Loop | None:
    """The smallest loop around all of these."""
    around = [loop for loop in loops(graph) if all(one.body < loop.body for one in inner)]
    return min(around, key=lambda loop: len(loop.body), default=None)


def loaded_dtype(instructions: Sequence[Instruction]) -> str:
    """The dtype of the elements of a loop, by how it converts them."""
    opcodes = [i.opcode for i in instructions]
    if any(opcode.startswith("HADD2.F32") for opcode in opcodes):
        return "float16"
    if any(purpose(i) == "convert" and i.name not in ("F2F", "F2FP") for i in instructions):
        return "bfloat16"
    single = any(re.match(r"F(ADD|MUL|FMA|SETP|MNMX|SEL)|F2F\.F64\.F32", o) for o in opcodes)
    return "float32" if single else "float64"


def hot_path(graph: Sequence[Block], loop: Loop) -> list[Instruction]:
    """The way around a loop that most elements take: the most bytes in the widest accesses; then
    the most work for slow units, which is for elements rather than for bounds; then the fewest
    instructions, which leaves out options."""
    moved = _mover(graph, loop)

    def value(instruction: Instruction) -> Value:
        slow = _first(UNITS, instruction.opcode) in ("special", "double")
        return moved(instruction), int(slow), -1

    return [i for step in pairwise(path(graph, loop, value)) for i in executed(graph, *step)]


def row_path(
    graph: Sequence[Block], loop: Loop, inner: Sequence[Loop], shared: bool
) -> list[Instruction]:
    """The way around a loop over rows, without its loops over elements: the shortest way through
    them.

    shared: a row is shared with other blocks, so barriers between blocks are on the way.
    """
    moved = _mover(graph, loop)

    def value(instruction: Instruction) -> Value:
        between = instruction.name.startswith("UCGABAR") or _is_memory_barrier(instruction)
        return moved(instruction), int(shared and between), -1

    streaming = {block for one in inner for block in one.body}
    steps = pairwise(path(graph, loop, value))
    return [i for step in steps if step[0] not in streaming for i in executed(graph, *step)]


def _mover(graph: Sequence[Block], loop: Loop) -> Callable[[Instruction], int]:
    """The bytes that an instruction moves in the widest accesses. In a loop without any, stores
    count alone: narrow loads may be of class weights, which are an option."""

    def moved(instruction: Instruction, names: frozenset[str], at_least: int) -> int:
        counts = instruction.name in names and instruction.guard != "!PT"
        return width(instruction) if counts and width(instruction) >= at_least else 0

    body = [i for block in loop.body for i in graph[block].instructions]
    if any(moved(i, LOADS | STORES | _SHARED, WIDE) for i in body):
        return lambda instruction: moved(instruction, LOADS | STORES | _SHARED, WIDE)
    return lambda instruction: moved(instruction, STORES, 1)


def elements(counts: Counts, size: int) -> float:
    """The elements that a streaming loop handles per trip and thread: what it stores or, if it
    stores nothing, what it loads in 16 bytes or in single elements."""
    if counts.stored:
        return counts.stored / size
    wide = sum(at * number for at, number in counts.loads.items() if at >= WIDE)
    return (wide or size * counts.loads.get(size, 0)) / size
