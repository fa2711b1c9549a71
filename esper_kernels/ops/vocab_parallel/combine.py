"""The loss and the measures of each row over the classes of all ranks, from what each rank
contributes: the same on every rank."""

import torch
from torch import Tensor

from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.measures import RowMeasures
from esper_kernels.ops.cross_entropy.reference import Options, RowSums
from esper_kernels.ops.vocab_parallel.reference import CLASS_SUMS


def sums_of(found: Tensor, options: Options, dtype: torch.dtype) -> tuple[RowSums, Tensor]:
    """The sums over the classes of all ranks, in `dtype`, and the rank of each target among them.

    found: float64 [ranks, num_sums(plan), ...], `class_sums` of each rank.
    """
    of_loss = found[:, : len(CLASS_SUMS)].unbind(1)  # [ranks, ...] each
    maxima, sums, targets, seconds, weighted, weights, ahead = of_loss
    row_max, above, factor = _of_origins(maxima, sums)
    row_sum = (factor * sums).sum(0)
    row_sum = torch.where(row_sum == 0, torch.nan, row_sum)  # nothing but -inf
    is_smooth = reference.is_on(options.label_smoothing)
    result = RowSums(
        row_max.to(dtype),
        row_sum.log().to(dtype),
        (targets.sum(0) - row_max).to(dtype),
        None if options.second is None else (seconds.sum(0) - row_max).to(dtype),
        (weighted + weights * above).sum(0).to(dtype) if is_smooth else None,
    )
    return result, ahead.sum(0)


def measures_of(
    found: Tensor, measured: Tensor, plan: MeasurePlan, dtype: torch.dtype
) -> RowMeasures:
    """The measures of each row [...] over the classes of all ranks, confidences in `dtype`.

    found: as for `sums_of`; measured: bool [...].
    """
    maxima, sums, targets = found[:, :3].unbind(1)  # [ranks, ...] each
    largest, places, squares, products, runners_up = found[:, len(CLASS_SUMS) :].unbind(1)
    row_max, above, factor = _of_origins(maxima, sums)
    total = (factor * sums).sum(0)
    nll = total.log() - (targets.sum(0) - row_max)
    square = (factor.square() * squares).sum(0)
    brier = (square / total.square() - 2 * (-nll).exp() + 1).clamp(min=0.0)
    entropy = margin = torch.zeros_like(nll)
    if plan.entropy:
        product = (factor * (products + above * sums)).sum(0)
        entropy = total.log() - product / total
        first, second = torch.cat([maxima, runners_up]).topk(2, dim=0).values.unbind()
        margin = first - second
    is_first = largest == largest.amax(0)
    predicted = torch.where(is_first, places, torch.inf).amin(0)  # of equals the lowest class
    return RowMeasures(
        torch.where(measured, predicted, -1).long(),
        (1 / total).to(dtype),
        (nll, brier, entropy, margin),
    )


def _of_origins(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of each row [...] over all ranks; for each rank [ranks, ...] how far its origin
    lies above that, and the factor that brings its exponentials there.

    maxima, sums: [ranks, ...], the first two of `CLASS_SUMS`.
    """
    row_max = maxima.amax(0)
    above = torch.where(maxima == -torch.inf, 0.0, maxima) - row_max
    return row_max, above, torch.where(sums == 0, 0.0, above.exp())  # not 0 * inf
