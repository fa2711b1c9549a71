"""`KernelConfig`: what a caller may choose about the kernels. Read by `backends.select_backend` only."""

from dataclasses import dataclass

BACKENDS = ("eager", "cpp", "triton", "cuda")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How the ops of this package run.

    backend: "auto" takes the first of the device's backends that can serve the call; a name takes that one or
        raises ValueError with the reason. Unknown names raise ValueError here.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {self.backend!r}")
