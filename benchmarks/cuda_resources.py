"""Registers and spilled bytes of every CUDA kernel, compiled without a GPU.

    python -m benchmarks cuda_resources    # writes results/cuda-resources.json

Needs `nvcc` on the path.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parents[1]
SOURCES = ("cross_entropy", "token_logprobs", "grad_stats")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# What the assembler reports about one kernel.
_KERNEL = re.compile(
    r"'(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes "
    r"spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_for(source: str, architecture: int, folder: Path) -> tuple[Path, str]:
    """The binary of `csrc/cuda/SOURCE.cu` for one architecture, and what the assembler reports."""
    binary = folder / f"{source}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    command += ["-cubin", f"csrc/cuda/{source}.cu", "-o", str(binary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"nvcc does not compile {source}.cu for sm_{architecture}: {done.stderr}"
        )
    return binary, done.stderr


def resources(source: str, architecture: int) -> list[dict[str, Any]]:
    """A row for each kernel of `csrc/cuda/SOURCE.cu`, compiled for one architecture.

    Shared memory is not in it, because its size is an argument of the launch.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, report = compile_for(source, architecture, Path(folder))
    return rows_of(report, architecture)


def rows_of(report: str, architecture: int) -> list[dict[str, Any]]:
    """The rows of `resources` from what the assembler reports with `-Xptxas=-v`."""
    parts = report.split("Compiling entry function ")[1:]
    found = [_KERNEL.match(part) for part in parts]
    if None in found:
        raise RuntimeError(f"cannot read nvcc's report: {report}")
    return [
        {
            "kernel": readable(kernel["name"]),
            "sm": architecture,
            "registers": int(kernel["registers"]),
            "spilled_bytes": int(kernel["stores"]) + int(kernel["loads"]),
        }
        for kernel in found
        if kernel is not None
    ]


def readable(mangled: str) -> str:
    """The kernel's name and template arguments."""
    whole = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    return re.sub(r"^void |\w+::|\(.*", "", whole.replace("(anonymous namespace)::", ""))


def main() -> None:
    """Compile everything, print a line per kernel and architecture, and write the figures."""
    record.parser("cuda_resources", __doc__).parse_args()
    rows = [row for source in SOURCES for sm in ARCHITECTURES for row in resources(source, sm)]
    for row in rows:
        print(row)
    print(record.write("cuda-resources", rows))


if __name__ == "__main__":
    main()
