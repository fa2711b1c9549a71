"""The definition of what a meter measures by row, in eager torch on any device.

A backend either fills the accumulators itself, in the same read as the loss, or calls
`measure_batch`, which reads the logits again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels.measures import ROW_SUMS, MeasurePlan
from esper_kernels.meter import Meter
from esper_kernels.sums import ordered_sum

_FIXED_POINT = 2.0**30
"""Confidences are added up as multiples of 1 / this, because integers give the same sum in any
order."""


class RowMeasures(NamedTuple):
    """The measures of each row [...]; of rows that are not measured, anything."""

    predicted: Tensor  # an integer, the class of the first largest logit; -1 where not measured
    confidence: Tensor  # the largest probability
    sums: tuple[Tensor, ...]  # in the order of ROW_SUMS


def row_measures(
    logits: Tensor, x: Tensor, target: Tensor, measured: Tensor, plan: MeasurePlan
) -> RowMeasures:
    """logits [..., V] as stored, and x after softcap; target int64 [...], 0 where there is none;
    measured: bool [...]. Entropy and margin are 0 unless they are wanted."""
    z = x - x.amax(-1, keepdim=True)
    e = z.exp()
    total = ordered_sum(e)
    p = e / total[..., None]
    at_target = target[..., None]
    is_target = torch.arange(x.shape[-1], device=x.device) == at_target
    nll = total.log() - z.gather(-1, at_target)[..., 0]
    brier = ordered_sum((p - is_target.to(p.dtype)).square())
    entropy = margin = torch.zeros_like(nll)
    if plan.entropy:
        # not -inf * 0
        entropy = total.log() - ordered_sum(torch.where(e > 0, e * z, 0.0)) / total
        margin = _margin(x)
    predicted = torch.where(measured, logits.argmax(-1), -1)
    return RowMeasures(predicted, 1 / total, (nll, brier, entropy, margin))


def _margin(x: Tensor) -> Tensor:
    if x.shape[-1] == 1:
        return torch.full_like(x[..., 0], torch.inf)
    largest, second = x.topk(2).values.unbind(-1)
    return largest - second


def add_measures(meter: Meter, target: Tensor, rows: RowMeasures) -> None:
    """Add the rows of a batch to a meter that takes measures. target: as for `row_measures`."""
    plan = meter.measures
    assert plan is not None
    sums, counts = meter.measure_accumulators()
    predicted = rows.predicted.flatten().long()
    measured = predicted >= 0
    predicted = predicted.clamp(min=0)
    target = target.flatten()
    one = measured.long()
    correct = (measured & (predicted == target)).long()
    places: list[Tensor] = []  # in `counts`, and what is added there
    added: list[Tensor] = []
    if plan.confusion:
        places += [target * plan.per_class + predicted]
        added += [one]
    elif plan.per_class:
        places += [target, plan.per_class + target, 2 * plan.per_class + predicted]
        added += [one, correct, one]

    row_sums = torch.stack([x.flatten() for x in rows.sums]).double()
    sums[: len(ROW_SUMS)].add_(ordered_sum(torch.where(measured, row_sums, 0.0)))
    if plan.calibration_bins:
        bins = plan.calibration_bins
        confidence = torch.where(measured, rows.confidence.flatten(), 0.0)
        place = (confidence * bins).long().clamp(max=bins - 1)
        places += [plan.num_class_counts + place, plan.num_class_counts + bins + place]
        added += [one, correct]
        fixed = (confidence.double() * _FIXED_POINT).round().long()
        in_bins = torch.zeros(bins, dtype=torch.int64, device=counts.device)
        in_bins.index_add_(0, place, fixed)
        sums[len(ROW_SUMS) :].add_(in_bins.double() / _FIXED_POINT)
    if places:
        counts.index_add_(0, torch.cat(places), torch.cat(added))
