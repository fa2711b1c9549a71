"""Builds the sources of csrc/cuda for the host, with `cuda/simt.h` of this folder instead of the
original."""

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SUFFIXES = (".cpp", ".cu", ".h")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


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
    library = Path(
        os.environ.get("ESPER_SHIM") or ROOT / "build" / f"cuda_shim-{_fingerprint()}.so"
    )
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        for old in library.parent.glob("cuda_shim-*.so"):
            old.unlink()
        build(library)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def _fingerprint() -> str:
    files = sorted(
        path for folder in (HERE, CSRC) for path in folder.rglob("*") if path.suffix in SUFFIXES
    )
    contents = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(contents + torch.__version__.encode()).hexdigest()[:16]
