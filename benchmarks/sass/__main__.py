"""A static roofline of every GPU kernel from its machine code; needs no GPU.

    python -m benchmarks sass                       # writes results/sass.json
    python -m benchmarks sass --sm 90 --only 8192   # prints some of them, writes nothing

Compiles and disassembles the kernels of the CUDA and Triton backends for sm_80, sm_90 and sm_100.
Needs `nvcc` on the path, and Triton with its interpreter off. docs/benchmarks.md explains the
figures.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from benchmarks import record
from benchmarks.sass.model import CHIPS
from benchmarks.sass.table import table

BACKENDS = ("cuda", "triton")


def main(arguments: list[str]) -> None:
    """Judge the kernels, and print and write what was found."""
    from benchmarks.sass.judge import judge
    from benchmarks.sass.kernels import compilers, subjects

    parser = record.parser("sass", __doc__)
    parser.add_argument("--sm", type=int, choices=CHIPS, help="one architecture")
    parser.add_argument("--backend", choices=BACKENDS, help="one backend")
    parser.add_argument("--only", default="", help="kernels with this in their names")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for sm in [options.sm] if options.sm else CHIPS:
        for backend in [options.backend] if options.backend else BACKENDS:
            for subject in subjects(sm, backend, options.only):
                rows.append(asdict(judge(subject)))
                print(f"sm_{sm} {backend} {subject.name}", file=sys.stderr)
    figures = {"compilers": compilers(), "rows": rows}
    print(table(figures, options.sm or 90))
    if not (options.sm or options.backend or options.only):
        print(record.write("sass", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
