"""Gradient statistics by the compiled op of `csrc/`, on the CPU and on CUDA: one read of all
tensors.

On CUDA the table by which the kernel finds the tensors stays with the results. With the same `out`,
it is filled again only if a tensor has moved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS
from esper_kernels.ops.grad_stats.stats import GradStats

_TABLE_WORDS = 5  # kGradTableWords of csrc/call.h


def fill(
    tensors: Sequence[Tensor | None],
    inv_scale: Tensor | None,
    stats: GradStats,
    instruction_set: str = "auto",
) -> None:
    if any(x is None for x in tensors):
        empty = stats.found_inf.new_empty(0)
        tensors = [empty if x is None else x for x in tensors]
    torch.ops.esper.grad_stats.default(
        tensors,
        inv_scale,
        INSTRUCTION_SETS.index(instruction_set),
        stats.magnitudes,
        stats.counts,
        stats.total_norm,
        stats.found_inf,
        *_tables(stats),
    )


def _tables(stats: GradStats) -> tuple[Tensor | None, Tensor | None]:
    """The kernel's table of tensors, and the host's record of what it holds; the CPU needs none."""
    device = stats.found_inf.device
    if device.type == "cpu":
        return None, None
    if "cuda" not in stats.workspace:
        stats.workspace["cuda"] = new_tables(stats.counts.shape[1], device)
    tables: tuple[Tensor, Tensor] = stats.workspace["cuda"]
    return tables


def new_tables(num_tensors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for both, int32 [num_tensors + 1, 5]; -1 on the host as long as nothing is in it."""
    shape = num_tensors + 1, _TABLE_WORDS
    on_device = torch.empty(shape, dtype=torch.int32, device=device)
    return on_device, torch.full(shape, -1, dtype=torch.int32, device="cpu")
