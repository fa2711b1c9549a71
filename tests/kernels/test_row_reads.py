"""The number of times that the logits are read from memory, counted by valgrind's simulation of
caches."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from esper_kernels.native import INSTRUCTION_SETS
from tests.helpers.builds import ROOT, kernels_of, require_compiler

CACHES = ("--D1=32768,8,64", "--LL=1048576,16,64")  # bytes, ways, bytes of a line
LINE = 64


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_forward_pass_reads_the_logits_once(tmp_path: Path) -> None:
    """Log-probabilities are computed alone or with entropies, and a shard of the classes alone or
    with measures. The caches hold one row and not all of them."""
    require_compiler()
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind here")
    program = tmp_path / "reads"
    # the best that the simulator knows
    sets = ("avx2",) if "avx2" in INSTRUCTION_SETS else ("baseline",)
    sources = [ROOT / "tests/helpers/row_reads.cpp", *kernels_of(sets, tmp_path)]
    command = ["g++", "-std=c++17", "-w", "-O1", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)

    def misses(*arguments: int) -> tuple[int, int]:
        """Reads that the last cache missed, and the bytes of the logits."""
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", *CACHES]
        command += ["--cachegrind-out-file=/dev/null", str(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"LLd misses:.*\(\s*([\d,]+) rd", done.stderr)
        assert found is not None, done.stderr
        return int(found[1].replace(",", "")), int(done.stdout)

    for is_bfloat16 in (0, 1):
        for kernel in (0, 1, 2, 3):
            before, _ = misses(0, kernel, is_bfloat16)
            after, size = misses(1, kernel, is_bfloat16)
            assert 0.99 < (after - before) * LINE / size < 1.05
