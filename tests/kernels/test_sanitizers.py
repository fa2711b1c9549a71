"""The kernel tests once more, on a copy of the ops built with address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    for name in ("esper_kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    include, lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    library = tmp_path / "esper_kernels" / "lib" / "esper_cpu.so"
    sources = [
        str(path)
        for path in (ROOT / "csrc/ops_cpu.cpp", ROOT / "csrc/call.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp")))
    ]
    flags = ["-shared", "-fPIC", "-O1", "-g", "-std=c++20", "-w", "-fsanitize=address,undefined"]
    flags += [
        "-fno-sanitize-recover=undefined",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{include}",
        f"-L{lib}",
    ]
    subprocess.run(["g++", *flags, *sources, "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(library)], check=True)

    def runtime(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"  # exceptions need the second beside the first
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    names = ("cross_entropy", "cross_entropy_step", "cross_entropy_inputs", "grad_stats", "cpp")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
