"""The compiled CPU kernels: loads the ops of `csrc/` once, and says why where they cannot be had.

`UNAVAILABLE` is None where `torch.ops.esper` is ready. `INSTRUCTION_SETS` are those this machine can run.
`ROAD` has the same calls past torch's dispatcher, for plain CPU tensors: a few hundred nanoseconds instead of
four microseconds; `NO_ROAD` says why it is None.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

_LIBRARY = Path(__file__).with_name("lib") / "esper_cpu.so"


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
    if not _LIBRARY.exists():
        return _Loaded("the CPU kernels are not built (pure Python install)")
    try:
        torch.ops.load_library(str(_LIBRARY))
        native: Any = import_module("esper_kernels._native")  # after the library, which it looks into
    except (OSError, ImportError, RuntimeError) as error:
        return _Loaded(f"the CPU kernels do not load: {' '.join(str(error).split())[:300]}")
    for name in ("cross_entropy", "cross_entropy_backward", "grad_stats"):
        torch.library.register_fake(f"esper::{name}", _writes_only)
    facts = (None, tuple(native.instruction_sets(str(_LIBRARY))), native.compiler)
    try:
        return _Loaded(*facts, Road(*native.road(str(_LIBRARY), torch.Tensor)), None)
    except (AttributeError, RuntimeError) as error:
        return _Loaded(*facts, None, f"torch {torch.__version__} does not offer it: {error}")


def _writes_only(*arguments: object) -> None:
    """What a compiler has to know of an op that returns nothing."""


UNAVAILABLE, INSTRUCTION_SETS, COMPILER, ROAD, NO_ROAD = _load()
