"""`info()`: versions and the backend of every op; `python -m esper_kernels.info` prints it."""

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from esper_kernels import native
from esper_kernels.backends import OPS, select_backend
from esper_kernels.config import DTYPES
from esper_kernels.version import CHECKED, __version__

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
_UNVERIFIED = (
    "tested in a simulator on the CPU, not yet on a GPU: check with python -m "
    "esper_kernels.info --check"
)


_NOTES = (
    "probability targets: CrossEntropyLoss hands them to F.cross_entropy, uncounted; the functions "
    "refuse them",
    "measures of a Meter (per_class, calibration_bins, entropy): cpp, triton and cuda take them in "
    "the read of the loss; where ranks divide the classes, eager torch reads the logits once more",
    "class_dim: cpp reads and writes logits with the classes anywhere; the other backends copy "
    "them, unless the classes are next to each other in memory",
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that serves an op for a device type and dtype; None if none can. `why` holds the
    refusals."""

    op: str
    device_type: str
    dtype: str
    backend: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions and choices; `str()` is a readable table, dtypes with the same answer on one line.

    instruction_sets: those of the compiled CPU kernels that this machine can run; the first is the
    default.
    """

    versions: dict[str, str]
    instruction_sets: tuple[str, ...]
    cuda_available: bool
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        ranges = (f"{name} {oldest} to {newest}" for name, (oldest, newest) in CHECKED.items())
        lines.append(f"checked with: {', '.join(ranges)}")
        lines.append(f"CUDA device: {'yes' if self.cuda_available else 'no'}")
        lines.append(f"CPU kernels: {', '.join(self.instruction_sets) or native.UNAVAILABLE}")
        lines.append(f"CUDA kernels: {native.cuda_unavailable() or 'ready'}; {_UNVERIFIED}")
        dtypes: dict[tuple[str, str, str, str], list[str]] = {}
        for row in self.choices:
            dtypes.setdefault((row.op, row.device_type, row.backend or "none", row.why), []).append(
                row.dtype
            )
        for (op, device_type, backend, why), names in dtypes.items():
            lines.append(
                f"{op:20} {device_type:5} {backend:7} {', '.join(names)}"
                + (f"  ({why})" if why else "")
            )
        return "\n".join([*lines, *_NOTES])


def info() -> Info:
    """Versions, and a choice for each op, device type and dtype."""
    versions = {
        "esper_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    versions |= {"triton": _triton_version(), "compiler": native.COMPILER}
    choices = tuple(
        _choice(op, device, dtype) for op in OPS for device in _DEVICE_TYPES for dtype in DTYPES
    )
    return Info(
        versions=versions,
        instruction_sets=native.INSTRUCTION_SETS,
        cuda_available=torch.cuda.is_available(),
        choices=choices,
    )


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _choice(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    backend: str | None
    try:
        backend, refused, _ = select_backend(op, device_type, dtype)
        why = "; ".join(f"{name}: {reason}" for name, reason in refused)
    except ValueError as error:
        backend = None
        why = str(error)
    dtype_name = str(dtype).removeprefix("torch.")
    return Choice(op=op, device_type=device_type, dtype=dtype_name, backend=backend, why=why)
