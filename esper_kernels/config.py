"""`KernelConfig`, a caller's choice of kernels, and the names and dtypes that all ops share."""

from dataclasses import dataclass

import torch

BACKENDS = ("eager", "cpp", "triton", "cuda")
INSTRUCTION_SETS = ("auto", "avx512bf16", "avx512", "avx2", "baseline")  # as in csrc/cpu/driver.h
REDUCTIONS = ("mean", "sum", "none")  # in the order of csrc/call.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of logits and of gradients
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Settings of the ops of this package.

    backend: "auto" takes the first of the device's backends that can serve the call; a name takes
        that one, or raises ValueError with the reason. Unknown names raise ValueError here.
    instruction_set: for the `cpp` backend: "auto" takes the best that this machine has;
        "avx512bf16", "avx512", "avx2" or "baseline" takes that one, or raises ValueError if the
        machine or build lacks it.
    """

    backend: str = "auto"
    instruction_set: str = "auto"

    def __post_init__(self) -> None:
        known = {"backend": ("auto", *BACKENDS), "instruction_set": INSTRUCTION_SETS}
        for name, names in known.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in names:
                raise ValueError(f"{name} must be one of {names}, got {value!r}")


def instruction_set_of(config: object) -> str:
    """The instruction set that a config asks for; "auto" for None, and for an argument of another
    type, which `select_backend` refuses."""
    asked: str = getattr(config, "instruction_set", "auto")
    return asked
