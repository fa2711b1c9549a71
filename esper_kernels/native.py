"""The compiled kernels: loads the ops of `csrc/` once, and says why if they cannot be had.

`UNAVAILABLE` is None if `torch.ops.esper` is ready on the CPU, `cuda_unavailable()` if it is on
CUDA. `INSTRUCTION_SETS` are those that this machine can run. The libraries hold torch ops and no
Python module, so that one build serves every Python version.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS as _NAMES

_LIBRARY = Path(__file__).with_name("lib") / "esper_cpu.so"
_CUDA_LIBRARY = _LIBRARY.with_name("esper_cuda.so")
_OPS = (
    "cross_entropy",
    "cross_entropy_backward",
    "class_sums",
    "token_logprobs",
    "token_logprobs_backward",
    "grad_stats",
    "use_huge_pages",
)


class _Loaded(NamedTuple):
    unavailable: str | None
    instruction_sets: tuple[str, ...] = ()
    compiler: str = "none"
    registration: torch.library.Library | None = None  # lasts as long as it is referenced


def _load() -> _Loaded:
    if torch.__version__ < "2.10":
        return _Loaded(
            f"the compiled kernels need torch 2.10 or newer, this is {torch.__version__}"
        )
    if not _LIBRARY.exists():
        return _Loaded("the CPU kernels are not built (pure Python install)")
    try:
        torch.ops.load_library(str(_LIBRARY))
        library = ctypes.CDLL(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return _Loaded(f"the CPU kernels do not load: {_one_line(error)}")
    registration = torch.library.Library("esper", "IMPL")
    for name in _OPS:
        torch.library.register_fake(f"esper::{name}", _check_devices)
        # Derivatives come from the autograd function around the op.
        registration.impl(name, torch.library.fallthrough_kernel, "Autograd")
    library.esper_has_instruction_set.restype = ctypes.c_bool
    library.esper_compiler.restype = ctypes.c_char_p
    usable = (library.esper_has_instruction_set(ctypes.c_int64(i)) for i in range(len(_NAMES)))
    sets = tuple(
        name for name, there in zip(_NAMES, usable, strict=True) if there and name != "auto"
    )
    return _Loaded(None, sets, library.esper_compiler().decode(), registration)


def _check_devices(*arguments: Any) -> None:
    """The implementation that compilers run instead of an op: the ops only write to memory that
    they are given."""
    flat = [x for part in arguments for x in (part if isinstance(part, (list, tuple)) else (part,))]
    devices = {str(x.device) for x in flat if isinstance(x, Tensor)}
    # torch takes this for the op where devices are mixed
    if "meta" in devices and len(devices) > 1:
        raise ValueError(f"esper: expected all tensors on one device, got {sorted(devices)}")


def assume_constant(function: Any) -> None:
    """Let compilers call the function while they trace, and take its result for a constant.

    As `torch.compiler.assume_constant_result`, which imports torch's compiler for it: that takes as
    long as importing torch.
    """
    function._dynamo_marked_constant = True


@cache
def _load_cuda() -> str | None:
    if UNAVAILABLE is not None:  # the library of CPU ops defines the schemas
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
    """The reason why the CUDA kernels cannot run; None if they can. Looks for a device, so it runs
    when first asked."""
    return _load_cuda()


assume_constant(cuda_unavailable)


def _one_line(error: Exception) -> str:
    # The cause says what is wrong with the file.
    return " ".join(str(error.__cause__ or error).split())[:300]


UNAVAILABLE, INSTRUCTION_SETS, COMPILER, _REGISTRATION = _load()
