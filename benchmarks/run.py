"""`python -m benchmarks.run NAME [SHAPE...]`: one measurement by its name."""

import sys

from benchmarks import cpu, gpu

BENCHMARKS = {"cpu": cpu.main, "gpu": gpu.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python -m benchmarks.run {{{','.join(BENCHMARKS)}}} [SHAPE...]")
    BENCHMARKS[sys.argv[1]](sys.argv[2:])
