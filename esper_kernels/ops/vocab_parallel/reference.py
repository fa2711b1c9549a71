"""One rank's part of the cross entropy of divided classes, in eager torch on any device.

A backend is a module with these two functions; `divided` does the rest, which is small and the same
for all. They trust their arguments, and never wait for the device or for another rank.
"""

import torch
from torch import Tensor

from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.vocab_parallel.shard import ClassShard
from esper_kernels.sums import ordered_sum

CLASS_SUMS = ("maximum", "exponential", "target", "second", "weighted", "weights", "ahead")
"""With x the logits after softcap and the origin their maximum, or 0 where that is -inf: the
maximum, the sum of exp(x - origin), x of the target and of MixUp's second target, 0 if they lie
elsewhere; with label smoothing the sums of weight (x - origin) and of weight; with target_logit
the number of classes that rank before the target."""
MEASURE_SUMS = ("largest", "place", "square", "product", "runner_up")
"""With measures also: the largest logit as stored and the first class that has it; the sum of
exp(x - origin)^2; with entropy the sum of exp(x - origin) (x - origin), and x of the largest other
logit, -inf without any."""


def num_sums(plan: MeasurePlan | None) -> int:
    """The number of sums per row that a rank contributes."""
    return len(CLASS_SUMS) + (len(MEASURE_SUMS) if plan else 0)


def class_sums(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    target_logit: Tensor | None,
    plan: MeasurePlan | None,
    shard: ClassShard,
) -> Tensor:
    """The contribution of this rank's classes to the loss of each row, and to its measures.

    logits [..., V of this rank], targets [...] in [0, shard.num_classes), options.weight for all
    classes, target_logit [...]: the logit of each target, wherever it lies, where rows are counted.

    Returns float64 [num_sums(plan), ...]: CLASS_SUMS, then MEASURE_SUMS where plan is not None;
    numbers of rows that are not valid have no meaning.
    """
    rows = reference.classify(targets, shard.num_classes, options.ignore_index)
    x = reference.capped(logits, options.softcap)
    maximum = x.amax(-1)
    # A shard of nothing but -inf has a sum of 0; -inf - -inf would be NaN.
    from_origin = x - torch.where(maximum == -torch.inf, 0.0, maximum)[..., None]
    nothing = torch.zeros_like(maximum)
    second = weighted = weights = ahead = nothing
    if options.second is not None:
        second = at_class(x, options.second, shard)
    if reference.is_on(options.label_smoothing):
        all_weights = reference.class_weights(options.weight, shard.num_classes, x)
        own_weights = all_weights[shard.first : shard.first + x.shape[-1]]
        weighted = ordered_sum(from_origin * own_weights)
        weights = ordered_sum(own_weights).expand_as(maximum)
    if target_logit is not None:
        ahead = reference.ranks(logits, rows.target, target_logit, shard.first)
    target = at_class(x, rows.target, shard)
    e = from_origin.exp()
    parts = [maximum, ordered_sum(e), target, second, weighted, weights, ahead]
    if plan:
        product = runner_up = nothing
        if plan.entropy:
            product = ordered_sum(torch.where(e > 0, e * from_origin, 0.0))  # not 0 * -inf
            runner_up = _second_largest(x)
        place = logits.argmax(-1) + shard.first
        parts += [logits.amax(-1), place, ordered_sum(e.square()), product, runner_up]
    return torch.stack([part.double() for part in parts])


def _second_largest(x: Tensor) -> Tensor:
    """The second-largest value of each row of x [..., V]; -inf for one class."""
    if x.shape[-1] == 1:
        return torch.full_like(x[..., 0], -torch.inf)
    return x.topk(2).values[..., 1]


def at_class(x: Tensor, classes: Tensor, shard: ClassShard) -> Tensor:
    """x [..., V of this rank] at one of all classes for each row [...], 0 if that lies
    elsewhere."""
    place = classes - shard.first
    here = (place >= 0) & (place < x.shape[-1])
    return torch.where(here, reference.pick(x, torch.where(here, place, 0)), 0.0)


def backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    denominator: Tensor,
    options: Options,
    shard: ClassShard,
    out: Tensor | None,
) -> Tensor:
    """d(loss)/d(logits) for the classes of this rank, times grad_output, into `out` (may be the
    logits) or new memory."""
    grad = reference.backward(
        grad_output,
        logits,
        targets,
        row_max,
        row_log_sum,
        denominator,
        options,
        first_class=shard.first,
        num_classes=shard.num_classes,
    )
    return grad if out is None else out.copy_(grad)
