"""How setup.py decides about CUDA kernels, and what it builds where there is a toolkit but no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Loads the library and says what it thinks of this machine, and where the ops are registered.
ASK = """
import ctypes, torch, esper_kernels
from esper_kernels.native import _CUDA_LIBRARY
torch.ops.load_library(str(_CUDA_LIBRARY))
reason = ctypes.create_string_buffer(300)
ctypes.CDLL(str(_CUDA_LIBRARY)).esper_cuda_refusal(reason, ctypes.c_int64(300))
print(reason.value.decode())
ops = ("cross_entropy", "cross_entropy_backward", "grad_stats")
print(all(torch._C._dispatch_has_kernel_for_dispatch_key(f"esper::{op}", "CUDA") for op in ops))
"""


def setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_decision_is_printed_with_its_reason() -> None:
    done = setup("--name", NO_CUDA="1")
    assert "no CUDA kernels, because: NO_CUDA=1;" in done.stdout
    if torch.version.cuda is None:
        done = setup("--name")
        assert "no CUDA kernels, because: this torch is built without CUDA (FORCE_CUDA=1" in done.stdout


def test_forcing_cuda_without_a_toolkit_fails_with_a_way_out(tmp_path: Path) -> None:
    done = setup("--name", FORCE_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path), CXX=sys.executable)
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but there is no nvcc; set CUDA_HOME to a CUDA toolkit" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_library_is_built_and_loaded_without_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or g++ here")
    if torch.version.cuda is not None:
        pytest.skip("here `make` builds it, and the other kernel tests run it")
    for name in ("csrc", "esper_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    wrong = setup("build_ext", "--inplace", cwd=tmp_path, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="hopper")
    assert "TORCH_CUDA_ARCH_LIST holds numbers such as 9.0 or 9.0+PTX, got 'hopper'" in wrong.stderr
    done = setup("build_ext", "--inplace", cwd=tmp_path, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "because: FORCE_CUDA=1;" in done.stdout
    # A torch without CUDA lacks one function that the library needs.
    stub = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "stub.so")]
    subprocess.run(command, input=stub, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "stub.so"), "PYTHONPATH": str(tmp_path)}
    asked = subprocess.run(
        [sys.executable, "-c", ASK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert asked.stdout.splitlines() == ["there is no NVIDIA driver", "True"]
