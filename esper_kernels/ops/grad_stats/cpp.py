"""Gradient statistics by the compiled op of `csrc/`, on the CPU and on CUDA: one read of all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SET_NAMES
from esper_kernels.native import Road
from esper_kernels.ops.grad_stats.stats import GradStats


def fill(
    tensors: Sequence[Tensor | None], inv_scale: Tensor | None, stats: GradStats, instruction_set: str = "auto"
) -> None:
    nothing = stats.found_inf.new_empty(0)
    torch.ops.esper.grad_stats.default(
        [nothing if x is None else x for x in tensors],
        inv_scale if inv_scale is None or inv_scale.dtype == torch.float32 else inv_scale.double(),
        INSTRUCTION_SET_NAMES.index(instruction_set),
        *_memory(stats),
    )


def direct_fill(
    road: Road, tensors: list[Tensor | None], inv_scale: Tensor | None, stats: GradStats, instruction_set: str
) -> tuple[int, ...] | None:
    """`fill` past the dispatcher, checks included; gives the sizes, or None for what it leaves to the checked road."""
    if inv_scale is not None and not isinstance(inv_scale, Tensor):
        return None
    return road.grad_stats(tensors, inv_scale, instruction_set, *_memory(stats))


def _memory(stats: GradStats) -> tuple[Tensor, ...]:
    """What is written, in the order of the op and of the road."""
    columns = stats.norms, stats.max_abs, stats.zeros, stats.nans, stats.infs
    return *columns, stats.total_norm, stats.found_inf
