"""Builds the sources of csrc/cuda for the host, with `cuda/simt.h` of this folder instead of the
original."""

import ctypes
import fcntl
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
    library = os.environ.get("ESPER_SHIM") or str(built(ROOT / "build"))
    torch.ops.load_library(library)
    return ctypes.CDLL(library)


def built(folder: Path) -> Path:
    """The library of these sources in `folder`, which replaces those of older sources.

    Processes that need it at the same time wait for the one that builds it.
    """
    folder.mkdir(exist_ok=True)
    library = folder / f"cuda_shim-{_fingerprint()}.so"
    with (folder / "cuda_shim.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob("cuda_shim-*.so"):
                old.unlink()
            unfinished = library.with_suffix(".unfinished")
            build(unfinished)
            unfinished.rename(library)
    return library


def _fingerprint() -> str:
    files = sorted(
        path for folder in (HERE, CSRC) for path in folder.rglob("*") if path.suffix in SUFFIXES
    )
    contents = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(contents + torch.__version__.encode()).hexdigest()[:16]
