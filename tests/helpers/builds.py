"""Other builds of the kernels, for tests: with sanitizers, for other instruction sets."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNELS = (ROOT / "csrc/call.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp")))
INSTRUCTION_SET_SOURCES = ("avx512bf16", "avx512", "avx2", "baseline")
SANITIZERS = (
    "-O1",
    "-g1",  # lines alone: with variables, compiling takes a third longer
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
# The AVX-512 source, with its instructions in plain code; it is offered wherever AVX2 is.
AVX512_SHIM = (
    f"-I{ROOT / 'tests/kernels/avx512_shim'}",
    "-D__builtin_cpu_supports(name)=1",
    "-Wno-psabi",
)


def copy_with_ops(to: Path, *flags: str, sources: tuple[Path, ...] = KERNELS) -> Path:
    """Copies the package and its tests to `to`, and compiles the library of ops from `sources`."""
    require_compiler()
    shutil.copy(ROOT / "pyproject.toml", to)
    for name in ("esper_kernels", "tests"):
        # other processes may be writing there
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, to / name, ignore=caches)
    include = Path(torch.__file__).parent / "include"
    lib = Path(torch.__file__).parent / "lib"
    options = ["-shared", "-fPIC", "-std=c++20", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    files = [str(path) for path in (ROOT / "csrc/ops_cpu.cpp", *sources)]
    libraries = [f"-L{lib}", "-lc10", "-ltorch", "-ltorch_cpu"]
    library = to / "esper_kernels/lib/esper_cpu.so"
    command = ["g++", *options, *flags, f"-I{include}", *files, *libraries, "-o", str(library)]
    subprocess.run(command, check=True)
    return to


def kernels_of(sets: tuple[str, ...], folder: Path) -> list[Path]:
    """The sources of `KERNELS` for programs that run these instruction sets only. Compiling the
    others would take most of the time; what stands for them in `folder` has their names alone."""
    sources = []
    for path in KERNELS:
        if path.stem in INSTRUCTION_SET_SOURCES and path.stem not in sets:
            empty = f'extern const Kernels kernels; const Kernels kernels{{"{path.stem}"}};'
            path = folder / path.name
            text = f'#include "cpu/kernels.h"\nnamespace esper::{path.stem} {{ {empty} }}\n'
            path.write_text(text, encoding="utf-8")
        sources.append(path)
    return sources


def build_testing_module(library: Path, *flags: str) -> ModuleType:
    """csrc/testing.cpp compiled with `flags`, for functions that the installed build lacks."""
    require_compiler()
    pybind11 = pytest.importorskip("pybind11")
    options = ["-shared", "-fPIC", "-std=c++17", "-O2", "-w", "-DESPER_TESTING"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    files = [str(path) for path in (ROOT / "csrc/testing.cpp", *KERNELS)]
    subprocess.run(["g++", *options, *flags, *includes, *files, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("cpp", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")


def sanitizer_environment() -> dict[str, str]:
    """The environment in which a process can load a library with sanitizers; ops run in two threads
    there."""

    def runtime(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Exceptions need the second library beside the first.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    return {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}


def run_python(code: list[str], folder: Path, **variables: str) -> str:
    """Runs Python in the copy at `folder` and returns what it printed."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(folder)}
    command = [sys.executable, *code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
