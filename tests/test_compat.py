"""`make compat`: how it reads versions, symbols and compilers; and that the range it found is the
one we promise."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import compat
from esper_kernels.version import CHECKED

ROOT = Path(__file__).parent.parent
ROWS = json.loads((ROOT / "benchmarks/results/compat.json").read_text())["figures"]


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_the_range_that_holds_is_the_one_that_is_promised() -> None:
    assert all(map(compat.holds, ROWS))
    for package, promised in CHECKED.items():
        versions = [row["version"] for row in ROWS if row["package"] == package]
        assert (minor(versions[0]), minor(versions[-1])) == promised
        assert promised[0] == ".".join(map(str, compat.OLDEST[package]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={CHECKED['torch'][0]}" in project["dependencies"]
    assert any(
        need.startswith(f"triton>={CHECKED['triton'][0]};")
        for need in project["optional-dependencies"]["dev"]
    )
    assert compat.table(ROWS) in (ROOT / "docs/clusters.md").read_text()


def test_info_shows_what_was_checked() -> None:
    command = [sys.executable, "-m", "esper_kernels.info"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        "checked with: torch {} to {}, triton {} to {}".format(
            *CHECKED["torch"], *CHECKED["triton"]
        )
        in said
    )


def test_every_minor_release_in_its_newest_patch() -> None:
    versions = [
        "2.15.0",
        "2.14.1",
        "2.14.0",
        "2.13.0+cpu",
        "2.10.12",
        "2.10.9",
        "2.9.1",
        "3.0.0rc1",
    ]
    assert compat.newest_patches(versions, (2, 10)) == ["2.10.12", "2.14.1", "2.15.0"]


def test_rows_name_the_symbols_that_a_release_lacks() -> None:
    sources = {"ops_cpu.cpp": "ok", "ops_cuda.cpp": "ok"}
    old = compat.TorchRelease("2.10.0", sources, {"ops_cpu.cpp": ["a"]}, frozenset("ab"))
    new = compat.TorchRelease("2.11.0", sources, {"ops_cpu.cpp": ["a", "c"]}, frozenset("abc"))
    broken = compat.TorchRelease(
        "2.12.0", sources | {"ops_cuda.cpp": "error: no"}, {}, frozenset("abc")
    )
    rows = compat.compared([old, new, broken])
    assert [row["lacks"] for row in rows] == [["c"], [], []]
    assert [compat.holds(row) for row in rows] == [False, True, False]
    assert "| 2.10.0 | ok | ok | 1 of 2 |" in compat.table(rows)
    triton = {"package": "triton", "version": "3.6.0", "compiled": 2, "failures": ["x"]}
    assert not compat.holds(triton)
    assert not compat.holds({**triton, "compiled": 0, "failures": []})
    assert "| 3.6.0 | 2 of 3 |" in compat.table([triton])


def test_symbols_that_a_library_takes_from_elsewhere(tmp_path: Path) -> None:
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("no g++ or nm here")
    source = """
    #include <cmath>
    #include <string>
    namespace esper { void ours(); }
    extern "C" int from_torch(double);
    extern "C" int offered(double x) {
      esper::ours();
      return from_torch(std::sin(x)) + std::to_string(x).size();
    }
    """
    library = tmp_path / "lib.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    assert compat.undefined(library) == ["from_torch"]
    assert "offered" in compat.symbols(library)


def test_what_a_compiler_says_first() -> None:
    assert (
        compat.first_error("In file included from x:\nx.cpp:1:2: error: no such name\nmore")
        == "error: no such name"
    )
    assert compat.first_error("killed\n") == "killed"
    assert compat.first_error("") == "no output"


def test_no_kernel_has_a_string_as_a_default() -> None:
    """Triton 3.6 does not make a constant of it; no other test here would show that."""
    files = sorted((ROOT / "esper_kernels").rglob("triton_kernels.py"))
    assert len(files) >= 2
    for path in files:
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        ]
        for function in functions:
            for default in (*function.args.defaults, *function.args.kw_defaults):
                assert not (isinstance(default, ast.Constant) and isinstance(default.value, str)), (
                    function.name
                )


def test_the_cuda_ops_use_no_macro_that_came_after_the_oldest_torch() -> None:
    source = (ROOT / "csrc/ops_cuda.cpp").read_text()
    assert not re.search(r"^\s*STABLE_TORCH_ERROR_CODE_CHECK", source, re.MULTILINE)
