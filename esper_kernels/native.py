"""The compiled CPU kernels: loads the ops of `csrc/` once, and says why where they cannot be had.

`UNAVAILABLE` is None where `torch.ops.esper` is ready. `INSTRUCTION_SETS` are those this machine can run.
"""

from importlib import import_module
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("lib") / "esper_cpu.so"


def _load() -> tuple[str | None, tuple[str, ...], str]:
    if not _LIBRARY.exists():
        return "the CPU kernels are not built (pure Python install)", (), "none"
    try:
        torch.ops.load_library(str(_LIBRARY))
        facts = import_module("esper_kernels._native")  # after the library, which it looks into
    except (OSError, ImportError, RuntimeError) as error:
        return f"the CPU kernels do not load: {' '.join(str(error).split())[:300]}", (), "none"
    for name in ("cross_entropy", "cross_entropy_backward", "grad_stats"):
        torch.library.register_fake(f"esper::{name}", _writes_only)
    return None, tuple(facts.instruction_sets(str(_LIBRARY))), facts.compiler


def _writes_only(*arguments: object) -> None:
    """What a compiler has to know of an op that returns nothing."""


UNAVAILABLE, INSTRUCTION_SETS, COMPILER = _load()
