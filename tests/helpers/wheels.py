"""Sources of the distribution, and commands that build and install it, for tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "csrc")
BIN = Path(sys.executable).parent
SWITCHES = ("ESPER_NO_EXT", "ESPER_ARCH", "ARCH", "NO_CUDA", "FORCE_CUDA", "CUDA_HOME")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", *SWITCHES)}
ENVIRONMENT |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(word) for word in command]
    return subprocess.run(
        arguments, cwd=cwd, env={**ENVIRONMENT, **variables}, capture_output=True, text=True
    )


def output(command: list[object], cwd: Path, **variables: str) -> str:
    done = run(command, cwd, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def sources(to: Path, built: bool = False) -> Path:
    """A copy of what the distribution is made of, with or without what was compiled in place."""
    to.mkdir()
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)
    left_out = ["__pycache__"] if built else ["__pycache__", "*.so"]
    for package in ("esper_kernels", "esper_train"):
        shutil.copytree(ROOT / package, to / package, ignore=shutil.ignore_patterns(*left_out))
    return to
