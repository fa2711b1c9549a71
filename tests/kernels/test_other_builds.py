"""The kernel tests once more on other builds of the ops: with sanitizers, and as for a machine that is no x86."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNELS = [ROOT / "csrc/call.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
NAMES = ("cross_entropy", "cross_entropy_step", "cross_entropy_inputs", "grad_stats", "cpp", "cpp_any_input")
AARCH64 = "aarch64-linux-gnu-g++"

pytestmark = pytest.mark.slow


def copy_with_ops(to: Path, sources: list[Path], *flags: str) -> Path:
    """The package and its tests, with the library of ops compiled from `sources`."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    for name in ("esper_kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)
    include, lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    options = ["-shared", "-fPIC", "-std=c++20", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    files = [str(path) for path in (ROOT / "csrc/ops_cpu.cpp", *sources)]
    libraries = [f"-L{lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(to / "esper_kernels/lib/esper_cpu.so")]
    subprocess.run(["g++", *options, *flags, f"-I{include}", *files, *libraries], check=True)
    return to


def run(code: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_kernel_tests(folder: Path, *more: str, **variables: str) -> None:
    files = [f"tests/kernels/test_{name}.py" for name in (*NAMES, *more)]
    run(["-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files], folder, **variables)


def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    folder = copy_with_ops(tmp_path, KERNELS, "-O1", "-g", *sanitizers)

    def runtime(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"  # exceptions need the second beside the first
    run_kernel_tests(folder, "cpp_limits", LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")


def test_kernels_without_anything_of_x86(tmp_path: Path) -> None:
    """What other machines compile: the baseline, by the compiler's vectors alone."""
    sources = []
    for path in KERNELS:
        sources.append(tmp_path / path.name)
        undefined = "".join(f"#undef {macro}\n" for macro in ("__x86_64__", "__SSE2__"))
        headers = "#include <utility>\n#include <cstdint>\n#include <cstring>\n"  # these have to know the machine
        sources[-1].write_text(f'{headers}{undefined}#include "{path}"\n', encoding="utf-8")
    folder = copy_with_ops(tmp_path, sources, "-O2")
    sets = run(["-c", "from esper_kernels.native import INSTRUCTION_SETS; print(*INSTRUCTION_SETS)"], folder)
    assert sets.split() == ["baseline"]
    run_kernel_tests(folder)


def test_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    if shutil.which(AARCH64) is None:
        pytest.skip(f"no {AARCH64} here")
    for path in KERNELS:
        command = [AARCH64, "-std=c++17", "-O2", "-fPIC", "-c", str(path), "-o", str(tmp_path / f"{path.stem}.o")]
        subprocess.run(command, check=True)
