"""Cross entropy of logits whose classes are divided among ranks, in eager torch on any device.

Every rank has all rows and targets, and some classes. One collective brings six numbers per row
and rank together, from which every rank computes the same loss; where correct predictions are
counted, another one first brings the logit of each row's target. The gradient needs none.
"""

import torch
from torch import Tensor

from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.reference import Forward, Number, Options, Rows, RowSums
from esper_kernels.ops.vocab_parallel.shard import ClassShard, gathered
from esper_kernels.sums import ordered_sum


@torch.no_grad()
def forward(
    logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, shard: ClassShard
) -> Forward:
    """logits [..., V of this rank], targets [...] in [0, shard.num_classes), options.weight for all
    classes. The loss, and what is added to `meter`, are those of all classes, on every rank."""
    rows = reference.classify(targets, shard.num_classes, options.ignore_index)
    x = reference.capped(logits, options.softcap)
    weights = reference.class_weights(options.weight, shard.num_classes, x)
    rank_here = None
    if meter is not None:
        own = at_target(logits, rows, shard).to(x.dtype)
        target_logit = gathered(own, shard.group).sum(0)  # all but one are 0
        rank_here = reference.ranks(logits, rows.target, target_logit, shard.first)

    sums, rank = combined(x, rows, options, weights, rank_here, shard)
    result, loss_sum, weight_sum = reference.loss_of(
        sums, rows, options, weights, meter is not None
    )
    if meter is not None and rank is not None:
        finite = result.row_max.isfinite()
        reference.add_to_meter(meter, rows, finite, rank, loss_sum, weight_sum)
    return result


def combined(
    x: Tensor,
    rows: Rows,
    options: Options,
    weights: Tensor,
    rank_here: Tensor | None,
    shard: ClassShard,
) -> tuple[RowSums, Tensor | None]:
    """The sums over the classes of all ranks, and the rank of each target among them."""
    own_max = x.amax(-1)
    # A shard of nothing but -inf has a sum of 0; -inf - -inf would be NaN.
    origin = torch.where(own_max == -torch.inf, 0.0, own_max)
    from_origin = x - origin[..., None]
    own_weights = weights[shard.first : shard.first + x.shape[-1]]
    smooth = reference.is_on(options.label_smoothing)
    parts = (
        own_max,
        ordered_sum(from_origin.exp()),
        at_target(x, rows, shard),
        ordered_sum(from_origin * own_weights) if smooth else torch.zeros_like(own_max),
        ordered_sum(own_weights).expand_as(own_max),
        torch.zeros_like(own_max) if rank_here is None else rank_here,
    )
    found = gathered(torch.stack([part.double() for part in parts]), shard.group)
    maxima, sums, targets, weighted, weight_sums, ahead = found.unbind(1)  # [ranks, ...] each

    row_max = maxima.amax(0)
    above = torch.where(maxima == -torch.inf, 0.0, maxima) - row_max  # of the origins
    row_sum = torch.where(sums == 0, 0.0, sums * above.exp()).sum(0)
    row_sum = torch.where(row_sum == 0, torch.nan, row_sum)  # nothing but -inf
    result = RowSums(
        row_max.to(x.dtype),
        row_sum.log().to(x.dtype),
        (targets.sum(0) - row_max).to(x.dtype),
        None,
        (weighted + weight_sums * above).sum(0).to(x.dtype) if smooth else None,
    )
    return result, None if rank_here is None else ahead.sum(0)


def at_target(x: Tensor, rows: Rows, shard: ClassShard) -> Tensor:
    """x at the target of each row where it is here, else 0."""
    place = rows.target - shard.first
    here = (place >= 0) & (place < x.shape[-1])
    return torch.where(here, reference.pick(x, torch.where(here, place, 0)), 0.0)


def backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    result: Forward,
    options: Options,
    shard: ClassShard,
) -> Tensor:
    """d(loss)/d(logits) for the classes of this rank, times grad_output."""
    return reference.backward(
        grad_output,
        logits,
        targets,
        *result[1:],
        options,
        first_class=shard.first,
        num_classes=shard.num_classes,
    )


@torch.no_grad()
def step(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: Number | None,
    out: Tensor | None,
    shard: ClassShard,
) -> Tensor:
    """The gradient for the classes of this rank times grad_scale, into `out` (may be the
    logits)."""
    result = forward(logits, targets, options, meter, shard)
    scale = torch.ones_like(result.denominator)
    if grad_scale is not None:
        scale = scale * grad_scale
    grad = backward(scale, logits, targets, result, options, shard)
    return grad if out is None else out.copy_(grad)
