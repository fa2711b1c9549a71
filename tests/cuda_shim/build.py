"""Builds the sources of csrc/cuda for the host, with `cuda/simt.h` of this folder in place of theirs."""

import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def build(library: Path, *flags: str) -> None:
    """A library of the ops under `torch.ops.esper_shim`, for CPU tensors. flags: for g++."""
    include, lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    sources = [HERE / "simt.cpp", HERE / "ops.cpp", CSRC / "call.cpp", CSRC / "cuda/driver.cpp"]
    sources += sorted((CSRC / "cuda").glob("*.cu"))
    options = ["-shared", "-fPIC", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-DUSE_CUDA", *flags]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}", f"-I{CSRC}", f"-I{include}", f"-L{lib}"]
    command = ["g++", *options, "-x", "c++", *map(str, sources), "-x", "none", "-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True)
