"""What a meter measures by row besides the loss, where the classes are divided among ranks."""

import torch
from torch import Tensor

from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.measures import RowMeasures
from esper_kernels.ops.cross_entropy.reference import RowSums
from esper_kernels.ops.vocab_parallel.shard import ClassShard, gathered
from esper_kernels.sums import ordered_sum


def row_measures(
    logits: Tensor,
    sums: RowSums,
    measured: Tensor,
    softcap: reference.Number | None,
    plan: MeasurePlan,
    shard: ClassShard,
) -> RowMeasures:
    """The measures of each row [...] over the classes of all ranks, on every rank.

    logits [..., V of this rank]; sums: those of all classes; measured: bool [...]. Reads the logits
    again, and takes one collective.
    """
    x = reference.capped(logits, softcap)
    largest, second = _two_largest(x)
    z = x - sums.row_max[..., None]
    e = z.exp()
    parts = (
        logits.amax(-1),
        logits.argmax(-1) + shard.first,
        ordered_sum(e),
        ordered_sum(e.square()),
        ordered_sum(torch.where(e > 0, e * z, 0.0)),  # not 0 * -inf
        largest,
        second,
    )
    found = gathered(torch.stack([part.double() for part in parts]), shard.group)
    tops, places, totals, squares, products, *two = found.unbind(1)  # [ranks, ...] each

    total = totals.sum(0)
    nll = sums.row_log_sum.double() - sums.target.double()
    brier = (squares.sum(0) / total.square() - 2 * (-nll).exp() + 1).clamp(min=0.0)
    entropy = margin = torch.zeros_like(nll)
    if plan.entropy:
        entropy = total.log() - products.sum(0) / total
        first, second = torch.cat(two).topk(2, dim=0).values.unbind()
        margin = first - second
    predicted = torch.where(tops == tops.amax(0), places, shard.num_classes).amin(0)
    return RowMeasures(
        torch.where(measured, predicted, -1),
        (1 / total).to(sums.row_max.dtype),
        (nll, brier, entropy, margin),
    )


def _two_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of x [..., V]; the second is -inf for one class."""
    if x.shape[-1] == 1:
        return x[..., 0], torch.full_like(x[..., 0], -torch.inf)
    largest, second = x.topk(2).values.unbind(-1)
    return largest, second
