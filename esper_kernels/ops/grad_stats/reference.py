"""The definition of gradient statistics, in eager torch on any device.

A backend is a module with this `fill`. It trusts its arguments and never waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_kernels.ops.grad_stats.stats import GradStats
from esper_kernels.sums import ordered_sum


def fill(
    tensors: Sequence[Tensor | None],
    inv_scale: Tensor | None,
    stats: GradStats,
    instruction_set: str = "auto",
) -> None:
    """Write the statistics of `tensors`, each value multiplied by inv_scale, into the tensors of
    `stats`."""
    columns = (*stats.magnitudes.unbind(), *stats.counts.unbind())
    for column in columns:
        column.zero_()  # what None and empty tensors keep
    for place, tensor in enumerate(tensors):
        if tensor is None or tensor.numel() == 0:
            continue
        x = tensor.reshape(-1).double()  # 1e20 and 1e-30 square without overflow or underflow
        if inv_scale is not None:
            x = x * inv_scale
        norm = ordered_sum(x.square()).sqrt()
        max_abs = x.abs().amax()
        counts = [mask.count_nonzero() for mask in (x == 0, x.isnan(), x.isinf())]
        for column, number in zip(columns, (norm, max_abs, *counts), strict=True):
            column[place] = number
    stats.total_norm.copy_(torch.linalg.vector_norm(stats.norms))
    stats.found_inf.copy_((stats.nans + stats.infs).sum() > 0)
