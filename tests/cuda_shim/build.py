"""Builds the sources of csrc/cuda for the host, with `cuda/simt.h` of this folder instead of the
original."""

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from tests.helpers.built_once import built_once

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# Debug information of lines alone: with that of variables, compiling takes a third longer.
SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(library: Path, *flags: str) -> None:
    """A library of the ops under `torch.ops.esper_shim`, for CPU tensors. flags: for g++."""
    include, lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    sources = [HERE / "simt.cpp", HERE / "ops.cpp", CSRC / "call.cpp", CSRC / "cuda/driver.cpp"]
    sources += sorted((CSRC / "cuda").glob("*.cu"))
    options = [
        "-shared",
        "-fPIC",
        "-O1",
        "-std=c++20",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-DUSE_CUDA",
        *flags,
    ]
    options += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{HERE}",
        f"-I{CSRC}",
        f"-I{include}",
        f"-L{lib}",
    ]
    command = [
        "g++",
        *options,
        "-x",
        "c++",
        *map(str, sources),
        "-x",
        "none",
        "-lc10",
        "-ltorch",
        "-ltorch_cpu",
    ]
    subprocess.run([*command, "-o", str(library)], check=True)


def load() -> ctypes.CDLL:
    """The library, built where the sources have changed, and loaded. It has `esper_shim_device`,
    see simt.cpp.

    ESPER_SHIM in the environment names another build to load.
    """
    library = os.environ.get("ESPER_SHIM") or str(built())
    torch.ops.load_library(library)
    return ctypes.CDLL(library)


def built() -> Path:
    """The library of these sources, made once."""
    return built_once("cuda_shim", build)


def built_with_sanitizers() -> Path:
    """The same for processes that have loaded the sanitizers' own library."""

    def make(library: Path) -> None:
        build(library, *SANITIZERS)

    return built_once("cuda_shim_sanitized", make, *SANITIZERS)
