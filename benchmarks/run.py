"""`python -m benchmarks.run NAME [CASE...]`: one measurement by its name."""

import sys

from benchmarks import cpu, epoch, gpu

BENCHMARKS = {"cpu": cpu.main, "epoch": epoch.main, "gpu": gpu.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python -m benchmarks.run {{{','.join(BENCHMARKS)}}} [CASE...]")
    BENCHMARKS[sys.argv[1]](sys.argv[2:])
