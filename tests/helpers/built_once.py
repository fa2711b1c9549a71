"""Results of compilers, made once: the processes that run the tests share them, and so do later
runs."""

import fcntl
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
SUFFIXES = (".cpp", ".cu", ".h", ".inc")


def built_once(name: str, make: Callable[[Path], None], *flags: str, folder: Path = BUILD) -> Path:
    """The file that `make(path)` writes from the C++ of csrc/ and tests/ with these flags. In
    `folder` it replaces those of the same name made from other sources, with other flags, or by
    another compiler.

    Processes that need it at the same time wait for the one that makes it.
    """
    folder.mkdir(exist_ok=True)
    made = folder / f"{name}-{_fingerprint(flags)}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            unfinished = made.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(made)
    return made


def _fingerprint(flags: tuple[str, ...]) -> str:
    folders = (ROOT / "csrc", ROOT / "tests")
    files = sorted(path for each in folders for path in each.rglob("*") if path.suffix in SUFFIXES)
    told = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    facts = "\0".join((told, torch.__version__, *flags))
    contents = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(contents + facts.encode()).hexdigest()[:16]
