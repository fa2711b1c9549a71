"""Instructions that the CPU kernels execute per logit, which other programs do not disturb.

    python -m benchmarks instructions     # `python -m benchmarks cpu` prints the same table

The kernels are compiled into a program without torch. A whole step is counted by `perf` where the
machine lets it, otherwise by valgrind, which knows no AVX-512. Beside that are the instructions of
the inner loops, read from the disassembly, for every instruction set. Writes
results/instructions.json.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record

ROOT = Path(__file__).parents[1]
DTYPES = {"float32": ("Float32", 0), "bfloat16": ("BFloat16", 1), "float16": ("Float16", 2)}
LANES = {"avx512bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}
"""Float32 numbers per vector of each instruction set, the best first."""
ROWS, CLASSES = 64, 4096
LOOPS = {
    "largest": (r"float esper::{set}::largest<esper::{set}::{type}>", "v?maxps"),
    "exponentials": (
        r"void esper::{set}::add_chunk<esper::{set}::{type}, false, "
        r"\(esper::{set}::Measuring\)0, true, false>",
        r"v?pslld \$0x17",
    ),
    "gradient": (
        r"void esper::{set}::write_chunk<esper::{set}::{type}, false, true, false, false>",
        "v?mulps",
    ),
}
"""The inner loops of a step: the function, and what it does once per vector."""


class Instruction(NamedTuple):
    address: int
    text: str

    def jumps_to(self) -> int | None:
        found = re.match(r"j\w+ +([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def build(program: Path, *flags: str, kernels: Sequence[Path] = ()) -> None:
    """Compile the kernels and benchmarks/instructions.cpp as the installed library is, or with
    further flags or other sources of the kernels."""
    sys.path.insert(0, str(ROOT))
    from setup import FLAGS, KERNELS

    sources = ["benchmarks/instructions.cpp", *map(str, kernels or KERNELS)]
    command = ["g++", "-std=c++20", "-w", "-Icsrc", *FLAGS, *flags, *sources, "-o", str(program)]
    subprocess.run(command, check=True, cwd=ROOT)


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """The instructions of every function, by its name as objdump writes it."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in disassembly.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(head[1], [])
        elif code := re.match(r" +([0-9a-f]+):\s+(.*\S)", line):
            current.append(Instruction(int(code[1], 16), re.sub(r"\s+", " ", code[2])))
    return found


def inner_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of the loops that hold no other loop."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    spans = [
        (places[target], end)
        for end, instruction in enumerate(code)
        if (target := instruction.jumps_to()) in places and places[target] <= end
    ]
    for begin, end in spans:
        if not any(span != (begin, end) and begin <= span[0] and span[1] <= end for span in spans):
            yield code[begin : end + 1]


def per_element(code: list[Instruction], marker: str, lanes: int) -> float | None:
    """Instructions per element of the best inner loop; None without one. `marker` matches one
    instruction for each vector of a trip."""
    found = []
    for body in inner_loops(code):
        vectors = sum(re.match(marker, instruction.text) is not None for instruction in body)
        if vectors:
            found.append(len(body) / (vectors * lanes))
    return min(found, default=None)


def of_loops(program: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Instructions per element of each loop, by instruction set and dtype; nothing without
    objdump."""
    if shutil.which("objdump") is None:
        return {}
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code = functions(done.stdout)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for level, lanes in LANES.items():
        for dtype, (kind, _) in DTYPES.items():
            row: dict[str, float | None] = {}
            for loop, (pattern, marker) in LOOPS.items():
                name = re.compile(pattern.format(set=level, type=kind))
                bodies = [body for key, body in code.items() if name.match(key)]
                sizes = [per_element(body, marker, lanes) for body in bodies]
                row[loop] = min((size for size in sizes if size is not None), default=None)
            found.setdefault(level, {})[dtype] = row
    return found


def of_step(program: Path, level: str, dtype: str) -> tuple[float, str] | None:
    """Instructions per element of a whole step, and what counted them; None where nothing can."""
    number = str(DTYPES[dtype][1])

    def command(calls: int) -> list[str]:
        return [str(program), str(calls), str(ROWS), str(CLASSES), number, level]

    if subprocess.run(command(1), capture_output=True).returncode:
        return None  # this machine lacks the instruction set
    for counter, count in (("perf", _by_perf), ("valgrind", _by_valgrind)):
        if shutil.which(counter) is None or (counter == "valgrind" and level.startswith("avx512")):
            continue
        few, many = count(command(1)), count(command(3))
        if few is not None and many is not None:
            return (many - few) / (2 * ROWS * CLASSES), counter
    return None


def _by_perf(command: list[str]) -> int | None:
    counted = ["perf", "stat", "-x,", "-e", "instructions:u", *command]
    done = subprocess.run(counted, capture_output=True, text=True)
    found = re.search(r"^(\d+),[^,]*,instructions", done.stderr, re.MULTILINE)
    return int(found[1]) if found else None


def _by_valgrind(command: list[str]) -> int | None:
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run([*tool, *command], capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    return int(found[1]) if found else None


def measure() -> list[dict[str, Any]]:
    """A row per instruction set and dtype: the loops, the step, and what counted that."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        build(program)
        loops = of_loops(program)
        rows = []
        for level in LANES:
            for dtype in DTYPES:
                step = of_step(program, level, dtype)
                row = {
                    "instruction set": level,
                    "dtype": dtype,
                    **loops.get(level, {}).get(dtype, {}),
                }
                rows.append(row | {"step": step and step[0], "counted by": step and step[1]})
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: instructions per logit."""
    lines = [["instruction set", "dtype", *LOOPS, "sum of the loops", "whole step"]]
    for row in rows:
        loops = [row.get(loop) for loop in LOOPS]
        known = [size for size in loops if size is not None]
        total = f"{sum(known):.2f}" if len(known) == len(loops) else ""
        step = "" if row["step"] is None else f"{row['step']:.2f} ({row['counted by']})"
        cells = ["" if size is None else f"{size:.2f}" for size in loops]
        lines.append([row["instruction set"], row["dtype"], *cells, total, step])
    return record.markdown(lines)


def main() -> None:
    """Count, print the table and write the figures."""
    record.parser("instructions", __doc__).parse_args()
    rows = measure()
    print(f"{table(rows)}\n\n{record.write('instructions', rows)}")


if __name__ == "__main__":
    main()
