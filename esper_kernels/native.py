"""The compiled kernels: loads the ops of `csrc/` once, and says why where they cannot be had.

`UNAVAILABLE` is None where `torch.ops.esper` is ready on the CPU, `cuda_unavailable()` where it is on CUDA.
`INSTRUCTION_SETS` are those this machine can run.
`ROAD` has the same calls past torch's dispatcher, for plain CPU tensors: a few hundred nanoseconds instead of
four microseconds; `NO_ROAD` says why it is None.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

_LIBRARY = Path(__file__).with_name("lib") / "esper_cpu.so"
_CUDA_LIBRARY = _LIBRARY.with_name("esper_cuda.so")


class Road(NamedTuple):
    """See csrc/bindings.cpp. Each checks everything itself and writes nothing where it does not serve."""

    cross_entropy: Callable[..., bool]
    cross_entropy_backward: Callable[..., bool]
    use_huge_pages: Callable[[torch.Tensor], None]
    grad_stats: Callable[..., tuple[int, ...] | None]


class _Loaded(NamedTuple):
    unavailable: str | None
    instruction_sets: tuple[str, ...] = ()
    compiler: str = "none"
    road: Road | None = None
    no_road: str | None = "the CPU kernels are not there"


def _load() -> _Loaded:
    if torch.__version__ < "2.10":
        return _Loaded(f"the compiled kernels need torch 2.10 or newer, this is {torch.__version__}")
    if not _LIBRARY.exists():
        return _Loaded("the CPU kernels are not built (pure Python install)")
    try:
        torch.ops.load_library(str(_LIBRARY))
        native: Any = import_module("esper_kernels._native")  # after the library, which it looks into
    except (OSError, ImportError, RuntimeError) as error:
        return _Loaded(f"the CPU kernels do not load: {_one_line(error)}")
    for name in ("cross_entropy", "cross_entropy_backward", "grad_stats"):
        torch.library.register_fake(f"esper::{name}", lambda *arguments: None)  # it only writes
    facts = (None, tuple(native.instruction_sets(str(_LIBRARY))), native.compiler)
    try:
        return _Loaded(*facts, Road(*native.road(str(_LIBRARY), torch.Tensor)), None)
    except (AttributeError, RuntimeError) as error:
        return _Loaded(*facts, None, f"torch {torch.__version__} does not offer it: {error}")


@cache
def _load_cuda() -> str | None:
    if UNAVAILABLE is not None:  # it defines the ops
        return UNAVAILABLE
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not _CUDA_LIBRARY.exists():
        return "the CUDA kernels are not built; a CUDA toolkit has to be there at the build"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the CUDA kernels do not load: {_one_line(error)}"
    reason = ctypes.create_string_buffer(300)
    ctypes.CDLL(str(_CUDA_LIBRARY)).esper_cuda_refusal(reason, ctypes.c_int64(len(reason)))
    return reason.value.decode() or None


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run, None where they can. Asks for a device, so not before somebody needs it."""
    return _load_cuda()


torch.compiler.assume_constant_result(cuda_unavailable)  # compilers trace the choice of a backend


def _one_line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]  # the cause says what is wrong with the file


UNAVAILABLE, INSTRUCTION_SETS, COMPILER, ROAD, NO_ROAD = _load()
