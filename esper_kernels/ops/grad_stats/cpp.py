"""Gradient statistics by the compiled op of `csrc/`, on the CPU and on CUDA: one read of all
tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS
from esper_kernels.ops.grad_stats.stats import GradStats


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
    )
