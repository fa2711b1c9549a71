"""The CPU kernels of this checkout beside those of an earlier one.

    git worktree add ../earlier v0.1.0
    (cd ../earlier && python setup.py build_ext --inplace)
    python -m benchmarks before ../earlier

Two processes, one for each checkout, time the same calls in turn, so that what disturbs the machine
disturbs both; the one that waits uses no processor. The memory that a process gets can make a call
faster or slower for as long as it runs, so several pairs of processes are measured. Printed are the
medians of both and the median of the ratios of all rounds. Figures of all shapes together are
written to results/before.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import before_calls, cpu, record

SHAPES = (*cpu.SHAPES, "bf16:2048x1000", *cpu.GRADS, "grads:40x1500")
PAIRS = 7
"""Of processes, per shape."""
ROUNDS = 9
"""Per pair."""


@contextmanager
def server(checkout: Path, shape: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves `shape` with the packages of `checkout`."""
    process = subprocess.Popen(
        [sys.executable, before_calls.__file__, shape],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # threads that wait for work must not take the processor from the other process
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen[str], question: str | None = None) -> Any:
    """The next line of a server, after a question."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question is not None:
        process.stdin.write(f"{question}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit("the kernels of a checkout could not be measured; is it built?")
    return json.loads(line)


def times_of(shape: str, earlier: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Microseconds of each call of `shape` in both checkouts, by one pair of processes."""
    here = Path(__file__).parents[1]
    with server(earlier, shape) as before, server(here, shape) as now:
        used, *names = answer(before)
        if Path(used) != earlier:
            sys.exit(f"{earlier} holds no esper_kernels: those of {used} would have been measured")
        answer(now)
        return {
            name: [(answer(before, name), answer(now, name)) for _ in range(rounds)]
            for name in names
        }


def measure(
    shape: str, earlier: Path, pairs: int = PAIRS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """The medians of each call of `shape` in both checkouts, in microseconds, and their ratio."""
    every = [times_of(shape, earlier, rounds) for _ in range(pairs)]
    times = {name: [pair for found in every for pair in found[name]] for name in every[0]}
    return [
        {
            "shape": shape,
            "call": name,
            "before": round(median(first for first, _ in found), 2),
            "now": round(median(second for _, second in found), 2),
            "ratio": round(median(second / first for first, second in found), 3),
        }
        for name, found in times.items()
    ]


def table(figures: dict[str, Any]) -> str:
    """Markdown: the ratio of each shape and call, and the two commits."""
    lines = [["shape", "call", f"{figures['earlier']}, us", "now, us", "now / before"]]
    for row in figures["rows"]:
        shape = row["shape"].replace("grads:", "gradients ").replace("bf16:", "bfloat16 ")
        times = [record.short(row[name]) for name in ("before", "now", "ratio")]
        lines.append([shape.replace("x", " x "), row["call"], *times])
    return record.markdown(lines)


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    """Measure each shape in turn, print one line each, and write the figures."""
    parser = record.parser("before", __doc__)
    parser.add_argument("earlier", type=Path, help="another checkout, built in place")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="as of `benchmarks cpu`")
    options = parser.parse_args()
    earlier = options.earlier.resolve()
    rows = []
    for shape in options.shapes or SHAPES:
        for row in measure(shape, earlier):
            rows.append(row)
            times = f"{row['before']:10.1f} us before {row['now']:10.1f} us now"
            print(f"{shape:16} {row['call']:10} {times}   ratio {row['ratio']:.3f}", flush=True)
    if not options.shapes:
        print(record.write("before", {"earlier": commit_of(earlier), "rows": rows}))


if __name__ == "__main__":
    main()
