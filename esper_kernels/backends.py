"""The one place that chooses a backend: a pure function of op, device type, dtype and config.

Every op calls `select_backend`, and `esper_kernels.info` shows it. `torch.compile` traces the
uncached function (it ignores caches, with a warning), and the choice becomes a constant of the
graph.
"""

import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch

from esper_kernels import native
from esper_kernels.config import KernelConfig

OPS = (
    "cross_entropy",
    "linear_cross_entropy",
    "vocab_parallel_cross_entropy",
    "token_logprobs",
    "grad_stats",
)
DEVICES_WITHOUT_FLOAT64 = ("mps",)

# The CUDA kernels come after Triton's until they have run on a GPU: neither is proven, and Triton's
# compiler leaves less room for mistakes.
_ORDER = {"cpu": ("cpp", "eager"), "cuda": ("triton", "cuda", "eager")}
_ORDER_ELSEWHERE = ("triton", "eager")
_DEFAULT = KernelConfig()


class BackendChoice(NamedTuple):
    """The backend that serves, and each (backend, reason) that was asked before it and refused."""

    name: str
    refused: tuple[tuple[str, str], ...]
    instruction_set: str = "auto"  # what the config asked for; `cpp` runs it


def refusal(
    op: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """The reason why `backend` cannot serve `op` on tensors of this device type and dtype; None if
    it can."""
    if backend == "eager":
        if device_type in DEVICES_WITHOUT_FLOAT64:
            return f"sums are float64, which device type {device_type!r} lacks"
        return None
    if op == "vocab_parallel_cross_entropy" and backend == "cuda":
        return "it has no kernels for logits whose classes are divided"
    if dtype == torch.float64 and (op, backend) != ("grad_stats", "triton"):
        return "float64 is served by eager only"
    if backend == "triton":
        return _triton_unavailable(device_type)
    if device_type != ("cpu" if backend == "cpp" else "cuda"):
        return f"runs on {'the CPU' if backend == 'cpp' else 'CUDA'} only, not on {device_type}"
    return native.UNAVAILABLE if backend == "cpp" else native.cuda_unavailable()


def _triton_unavailable(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"runs on GPUs that Triton compiles for, not on {device_type}"
    try:
        import triton
    except ImportError as error:
        return f"triton does not import: {error}"
    # Triton decides when it is imported; `torch.compile` cannot trace the knob itself.
    if device_type == "cpu" and isinstance(triton.language.zeros, triton.JITFunction):
        return (
            "runs on the CPU only in Triton's interpreter, for tests (TRITON_INTERPRET=1 before "
            "Python starts)"
        )
    return _no_launcher() if device_type == "cuda" else None


def _no_launcher() -> str | None:
    """The reason why Triton could not compile its launcher, a C program that it compiles when it
    launches its first kernel."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        asked = (
            f"CC={compilers[0]!r} names none"
            if "CC" in os.environ
            else "there is no gcc and no clang"
        )
        return (
            f"Triton needs a C compiler for its launcher, and {asked}; install one, or name it "
            "in CC"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return (
            f"Triton needs Python's headers for its launcher, and there is no {header}; install "
            "them (python3-dev)"
        )
    return None


native.assume_constant(_no_launcher)  # compilers trace the choice of a backend


def _select(op: str, device_type: str, dtype: torch.dtype, config: KernelConfig) -> BackendChoice:
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    if not isinstance(device_type, str) or not isinstance(dtype, torch.dtype):
        raise TypeError(
            "expected a device type such as 'cpu' and a dtype such as torch.float32, got "
            f"{device_type!r} and {dtype!r}"
        )
    order = (
        _ORDER.get(device_type, _ORDER_ELSEWHERE) if config.backend == "auto" else (config.backend,)
    )
    if config.instruction_set not in ("auto", *native.INSTRUCTION_SETS):
        had = ", ".join(native.INSTRUCTION_SETS) or native.UNAVAILABLE
        raise ValueError(
            f"instruction_set={config.instruction_set!r} cannot run here; there are: {had}"
        )
    refused: tuple[tuple[str, str], ...] = ()
    for backend in order:
        reason = refusal(op, backend, device_type, dtype)
        if reason is None:
            return BackendChoice(backend, refused, config.instruction_set)
        refused += ((backend, reason),)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refused)
    raise ValueError(
        f"no backend serves {op} on {device_type} with backend={config.backend!r}: {reasons}; "
        "python -m esper_kernels.info lists what serves where"
    )


_select_cached = lru_cache(maxsize=None)(_select)


def select_backend(
    op: str, device_type: str, dtype: torch.dtype, config: KernelConfig | None = None
) -> BackendChoice:
    """Choose the backend for `op` (a name in `OPS`) on tensors of this device_type and dtype.

    Raises TypeError for a config of another type, and ValueError with every reason where no backend
    can serve, or where the one named in `config` cannot.
    """
    if not isinstance(config, (KernelConfig, NoneType)):
        raise TypeError(
            f"config must be a KernelConfig or None, got {config!r}; pass one, such as "
            "KernelConfig(backend='eager')"
        )
    arguments = (op, device_type, dtype, _DEFAULT if config is None else config)
    if torch.compiler.is_compiling():
        return _select(*arguments)
    try:
        return _select_cached(*arguments)
    except TypeError:  # an argument that has no hash
        return _select(*arguments)
