"""Machine code as nvdisasm prints it: instructions, basic blocks, loops, and paths through loops.

Pure functions of the text of `nvdisasm -c`. Blocks are numbered in the order of the text, and block
0 is the kernel's entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

_SECTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
_LABEL = re.compile(r"([.$\w]+):\s*$")
_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_TARGET = re.compile(r"`\(([^)]+)\)")
_ENDS = {"EXIT", "RET", "BRX", "JMX"}  # where it goes next, if anywhere, is not in the text
Value = tuple[int, int, int]  # compared place by place


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate under which it executes, such as "!P0"; empty for always
    opcode: str  # with its modifiers, such as "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        return f"{'@' if self.guard else ''}{self.guard} {self.opcode} {self.operands}".strip()


@dataclass(frozen=True)
class Block:
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]  # its blocks, the header's and those of nested loops included


def functions(text: str) -> dict[str, list[str]]:
    """The lines of each kernel, by its name in the machine code."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            lines = found.setdefault(section[1], [])
        elif re.match(r"\s*\.section\s", line):
            lines = []
        else:
            lines.append(line)
    return found


def blocks(lines: Sequence[str]) -> list[Block]:
    """The control flow of one kernel. A call is an instruction like others: what it calls is not
    followed."""
    groups, starts = _groups(lines)
    return [
        Block(tuple(group), tuple(sorted(set(_successors(group, number, len(groups), starts)))))
        for number, group in enumerate(groups)
    ]


def _groups(lines: Sequence[str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    """The instructions of each block, and the block that each label stands before."""
    groups: list[list[Instruction]] = [[]]
    starts: dict[str, int] = {}
    for line in lines:
        label = _LABEL.match(line)
        instruction = _INSTRUCTION.match(line)
        if label:
            if groups[-1]:
                groups.append([])
            starts[label[1]] = len(groups) - 1
        elif instruction:
            one = Instruction(
                instruction["guard"] or "", instruction["opcode"], instruction["operands"]
            )
            groups[-1].append(one)
            if one.name in ("BRA", "JMP") or one.name in _ENDS:
                groups.append([])
    return groups, starts


def _successors(
    group: Sequence[Instruction], number: int, count: int, starts: dict[str, int]
) -> Iterator[int]:
    last = group[-1] if group else None
    jumps = last is not None and last.name in ("BRA", "JMP")
    if last is not None and jumps:
        target = _TARGET.search(last.operands)
        if target is None or target[1] not in starts:
            raise ValueError(f"a branch to a label of the kernel expected, got {str(last)!r}")
        yield starts[target[1]]
    # A branch may have a second condition before its label, as in "BRA P3, `(.L_x_6)".
    leaves = last is not None and not last.guard and (last.name in _ENDS or jumps)
    conditional = last is not None and jumps and not last.operands.startswith("`")
    if (not leaves or conditional) and number + 1 < count:
        yield number + 1


def _order(graph: Sequence[Block]) -> list[int]:
    """The blocks that can be reached, each before those that follow it, but for loops."""
    seen = {0}
    done: list[int] = []
    stack = [(0, iter(graph[0].successors))]
    while stack:
        block, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph[following].successors)))
    return done[::-1]


def _predecessors(graph: Sequence[Block]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in graph]
    for number, block in enumerate(graph):
        for successor in block.successors:
            found[successor].append(number)
    return found


def _dominators(graph: Sequence[Block]) -> dict[int, int]:
    """The dominators of each block that can be reached, as bits: the blocks that every path to it
    passes."""
    order = _order(graph)
    before = _predecessors(graph)
    everything = (1 << len(graph)) - 1
    dominators = dict.fromkeys(order, everything)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for predecessor in before[block]:
                common &= dominators.get(predecessor, everything)
            common |= 1 << block
            changed = changed or common != dominators[block]
            dominators[block] = common
    return dominators


def loops(graph: Sequence[Block]) -> list[Loop]:
    """The natural loops: one for each block that dominates a block which jumps back to it."""
    dominators = _dominators(graph)
    before = _predecessors(graph)
    bodies: dict[int, set[int]] = {}
    for end, dominated_by in dominators.items():
        for header in graph[end].successors:
            if not dominated_by >> header & 1:
                continue
            body = bodies.setdefault(header, {header})
            stack = [end]
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += (b for b in before[block] if b in dominators)
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def program(graph: Sequence[Block]) -> tuple[list[Block], Loop]:
    """A whole program as a loop, as if it began again at its end."""
    again = [replace(block, successors=(0,)) if _is_end(block) else block for block in graph]
    return again, Loop(0, frozenset(_order(graph)))


def _is_end(block: Block) -> bool:
    return not block.successors and any(i.name == "EXIT" for i in block.instructions[-1:])


def innermost(found: Sequence[Loop]) -> list[Loop]:
    """The loops that contain no other."""
    return [a for a in found if not any(b.body < a.body for b in found)]


def path(graph: Sequence[Block], loop: Loop, value: Callable[[Instruction], Value]) -> list[int]:
    """The blocks on the way once around a loop on which the sum of `value` is largest, from the
    header to the header. Nested loops are passed once."""
    order = [block for block in _order(graph) if block in loop.body]
    place = {block: number for number, block in enumerate(order)}
    best: dict[int, tuple[Value, int]] = {}
    for block in reversed(order):
        ways: list[tuple[Value, int]] = []
        for successor in graph[block].successors:
            if successor == loop.header:
                total = 0, 0, 0
            elif successor in best and place[successor] > place[block]:
                total = best[successor][0]
            else:
                continue  # out of the loop, or to another trip of a nested one
            for instruction in executed(graph, block, successor):
                first, second, third = value(instruction)
                total = total[0] + first, total[1] + second, total[2] + third
            ways.append((total, successor))
        if ways:
            best[block] = max(ways, key=lambda way: way[0])
    found = [loop.header, best[loop.header][1]]
    while found[-1] != loop.header:
        found.append(best[found[-1]][1])
    return found


def executed(graph: Sequence[Block], block: int, successor: int) -> list[Instruction]:
    """The instructions of a block that goes on to `successor`. Those that the predicate of its
    branch then rules out have the guard "!PT"."""
    found = list(graph[block].instructions)
    branch = found[-1] if found else None
    if branch is None or branch.name != "BRA" or not branch.guard or _conditions(branch) > 1:
        return found
    predicate = branch.guard.lstrip("!")
    negated = predicate if branch.guard.startswith("!") else f"!{predicate}"
    # the text goes on with the next block; any other is where the branch leads
    unmet = branch.guard if successor == block + 1 else negated
    for place in range(len(found) - 2, -1, -1):
        instruction = found[place]
        if instruction.guard == unmet:
            found[place] = replace(instruction, guard="!PT")
        if re.match(rf"(\w+, )?{predicate}\b", instruction.operands):
            break  # before it is computed, it is another
    return found


def _conditions(branch: Instruction) -> int:
    return bool(branch.guard) + (not branch.operands.startswith("`"))
