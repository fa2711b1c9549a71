"""`KernelConfig`: what a caller may choose about the kernels. Read by `backends.select_backend` only."""

from dataclasses import dataclass

BACKENDS = ("eager", "cpp", "triton", "cuda")
INSTRUCTION_SET_NAMES = ("auto", "avx512", "avx2", "baseline")  # in the order of csrc/cpu/driver.cpp


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How the ops of this package run.

    backend: "auto" takes the first of the device's backends that can serve the call; a name takes that one or
        raises ValueError with the reason. Unknown names raise ValueError here.
    instruction_set: of the `cpp` backend: "auto" takes the best this machine has; "avx512", "avx2" or "baseline"
        takes that one, or raises ValueError where the machine or the build lacks it.
    """

    backend: str = "auto"
    instruction_set: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {self.backend!r}")
        if self.instruction_set not in INSTRUCTION_SET_NAMES:
            raise ValueError(f"instruction_set must be one of {INSTRUCTION_SET_NAMES}, got {self.instruction_set!r}")
