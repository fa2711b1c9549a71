"""Instructions per element, read from a disassembly."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import instructions, record
from tests.helpers.builds import kernels_of

DISASSEMBLY = """
0000000000000000 <float esper::avx512::largest<esper::avx512::Float32>(float const*, long)>:
   0:\tmov    %rdi,%rax
   3:\tvmaxps (%rax),%zmm1,%zmm1
   9:\tvmaxps 0x40(%rax),%zmm2,%zmm2
  10:\tadd    $0x80,%rax
  14:\tcmp    %rax,%rsi
  17:\tjne    3 <float esper::avx512::largest<esper::avx512::Float32>(float const*, long)+0x3>
  19:\tvmaxps (%rdx),%zmm3,%zmm3
  1f:\tadd    $0x40,%rdx
  23:\tcmp    %rdx,%rsi
  26:\tjl     19 <float esper::avx512::largest<esper::avx512::Float32>(float const*, long)+0x19>
  28:\tdec    %rcx
  2b:\tjne    0 <float esper::avx512::largest<esper::avx512::Float32>(float const*, long)>
  2d:\tret

0000000000000030 <void other(int)>:
  30:\tret
"""


def test_the_best_inner_loop_counts() -> None:
    """Two vectors in five instructions, and not one in four or all within the outer loop."""
    found = instructions.functions(DISASSEMBLY)
    assert [len(code) for code in found.values()] == [13, 1]
    code = next(iter(found.values()))
    assert [len(body) for body in instructions.inner_loops(code)] == [5, 4]
    assert instructions.per_element(code, "v?maxps", 16) == 5 / 32
    assert instructions.per_element(code, "v?mulps", 16) is None


def test_a_table_shows_what_could_be_counted() -> None:
    loops = dict.fromkeys(instructions.LOOPS, 0.5)
    rows = [
        {"instruction set": "avx2", "dtype": "float32", **loops, "step": 2.0, "counted by": "perf"},
        {"instruction set": "avx512", "dtype": "float32", "step": None, "counted by": None},
    ]
    lines = instructions.table(rows).splitlines()
    assert lines[2] == "| avx2 | float32 | 0.50 | 0.50 | 0.50 | 1.50 | 2.00 (perf) |"
    assert lines[3] == "| avx512 | float32 |  |  |  |  |  |"


def check_loops(row: dict[str, float | None]) -> None:
    for loop in instructions.LOOPS:
        count = row[loop]
        assert count is not None, row
        assert 0.1 < count < 20, row


@pytest.mark.slow
def test_every_loop_is_found_in_the_kernels() -> None:
    """They are read in the module for tests, which has the same kernels, flags and names as the
    library."""
    module = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump here")
    found = instructions.of_loops(Path(module.__file__))
    assert found.keys() == instructions.LANES.keys()
    for rows in found.values():
        assert rows.keys() == instructions.DTYPES.keys()
        for row in rows.values():
            check_loops(row)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_is_counted(tmp_path: Path) -> None:
    """It is compiled without optimization and for one instruction set, which takes a fraction of
    the time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    program = tmp_path / "instructions"
    instructions.build(program, "-O0", kernels=kernels_of(("baseline",), tmp_path))
    counted = instructions.of_step(program, "baseline", "float32")
    if counted is None:
        pytest.skip("neither perf nor valgrind here")
    assert 1 < counted[0] < 10_000
    assert instructions.of_step(program, "unheard-of", "float32") is None


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_figure_is_measured() -> None:
    if shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("no g++ or no objdump here")
    rows = instructions.measure()
    assert len(rows) == len(instructions.LANES) * len(instructions.DTYPES)
    for row in rows:
        check_loops(row)


def test_results_of_machines_are_found_the_last_first(tmp_path: Path) -> None:
    for name, date in (("a", "2026-01-01"), ("b", "2026-03-01"), ("c", "2026-02-01")):
        results = {"environment": {"date": date}, "figures": name}
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps(results), encoding="utf-8")
    assert [found["figures"] for found in record.of_machines("cpu", tmp_path)] == ["b", "c", "a"]
    assert record.of_machines("gpu", tmp_path) == []


def test_a_machine_has_a_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        record, "_cpu_model", lambda: "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz"
    )
    assert record.machine_name() == "intel-xeon-platinum-8480-cpu-2-00ghz"
