"""The decision of setup.py about CUDA kernels; test_packaging.py looks at what it builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def setup(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_decision_is_printed_with_its_reason() -> None:
    done = setup("--name", NO_CUDA="1")
    assert "no CUDA kernels, because: NO_CUDA=1;" in done.stdout
    if torch.version.cuda is None:
        done = setup("--name")
        assert (
            "no CUDA kernels, because: this torch is built without CUDA (FORCE_CUDA=1"
            in done.stdout
        )


def test_forcing_cuda_without_a_toolkit_fails_with_a_way_out(tmp_path: Path) -> None:
    done = setup(
        "--name", FORCE_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path), CXX=sys.executable
    )
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but there is no nvcc; set CUDA_HOME to a CUDA toolkit" in done.stderr


def test_an_architecture_that_is_none_is_refused(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or g++ here")
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "esper_kernels").mkdir()
    done = setup("build_ext", cwd=tmp_path, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST holds numbers such as 9.0 or 9.0+PTX, got 'hopper'" in done.stderr
