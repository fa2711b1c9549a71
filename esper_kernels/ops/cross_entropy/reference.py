"""The definition of cross entropy and its metrics, in eager torch on any device.

A backend is a module with these functions: `forward` (returns the loss, then what its own
`backward` needs), `backward`, `step`, `record`. They trust their arguments, which
`esper_kernels.checks` has checked, and never wait for the device. A target outside [0, V) is not
valid, has zero gradient and is counted; on CPU tensors it has been refused before the call.

Long file: the definition of one op, MixUp and the meter included, is read in one place.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from esper_kernels.meter import SUMS, Meter
from esper_kernels.ops.cross_entropy.measures import add_measures, row_measures
from esper_kernels.sums import ordered_sum

LOWEST_EXPONENT = -86.0
"""Float32 exponentials of this and of smaller numbers are defined to be 0: they vanish beside 1,
and the share of zero gradients must not depend on the backend."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Likewise float32 gradients below the normal numbers are 0."""
Number = float | Tensor  # a tensor is [], on the logits' device or the CPU


class Options(NamedTuple):
    """The options of `esper_kernels.cross_entropy`, documented there."""

    weight: Tensor | None = None  # [V]
    ignore_index: int = -100
    label_smoothing: Number = 0.0
    z_loss: Number = 0.0
    softcap: Number | None = None  # a tensor only inside compiled graphs
    reduction: str = "mean"
    normalizer: Number | None = None
    instruction_set: str = "auto"  # for `cpp`
    second: Tensor | None = None  # int64 [...], the second target of each row, from `mixed`
    shares: Tensor | None = None  # [2, ...] float32 or float64, of the target and the second


class Forward(NamedTuple):
    """The loss, and what `backward` needs besides logits and targets."""

    loss: Tensor  # [], or [...] with reduction "none"
    # [...], of the logits after softcap; not finite exactly where the row is non-finite
    row_max: Tensor
    # [...]; lse = row_max + row_log_sum, kept apart so that a large offset costs nothing
    row_log_sum: Tensor
    denominator: Tensor  # float64 [], what the sum over rows is divided by


class RowSums(NamedTuple):
    """The quantities from which the loss of each row [...] is computed, besides its weight."""

    row_max: Tensor
    row_log_sum: Tensor
    target: Tensor  # x[target] - row_max
    second: Tensor | None  # x[second] - row_max, with MixUp
    weighted: Tensor | None  # sum over c of weight[c] (x[c] - row_max), with label smoothing


class RowFactors(NamedTuple):
    """The factors of the terms of each row's gradient; [] or [...]."""

    of_softmax: Tensor
    at_target: Tensor  # subtracted at the target
    at_second: Tensor | None  # likewise, with MixUp
    everywhere: Tensor | None  # of the class weights, subtracted; with label smoothing


class Rows(NamedTuple):
    """The class of each row [...]: exactly one of valid, ignored, bad."""

    target: Tensor  # int64, 0 where not valid
    valid: Tensor
    ignored: Tensor
    bad: Tensor


def classify(targets: Tensor, num_classes: int, ignore_index: int) -> Rows:
    targets = targets.long()  # first: a uint8 compared with -100 would be compared with 156
    ignored = targets == ignore_index
    bad = ~ignored & ((targets < 0) | (targets >= num_classes))
    valid = ~(ignored | bad)
    return Rows(torch.where(valid, targets, 0), valid, ignored, bad)


@torch.no_grad()
def mixed(
    targets: Tensor,
    targets2: Tensor,
    share: Number,
    options: Options,
    logits: Tensor,
    num_classes: int | None = None,
) -> tuple[Tensor, Options]:
    """MixUp: the definition of two targets per row, for every backend.

    share [] or [...]: that of `targets`; the other's is 1 - share. An ignored target has a share of
    0. Returns, for each row, the target with the larger share (the first of equals), which is the
    one that counts; and the options with the other one and both shares. The same target twice has
    both shares in the first place. A row is ignored if both targets are, and bad if one of them is.
    A mean divides by the sum of share * weight[target].

    A share outside [0, 1] makes the loss NaN; on CPU tensors it has been refused before the call.
    num_classes: None for those of the logits.
    """
    num_classes = logits.shape[-1] if num_classes is None else num_classes
    first = classify(targets, num_classes, options.ignore_index)
    other = classify(targets2, num_classes, options.ignore_index)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    share = torch.zeros(targets.shape, dtype=dtype, device=targets.device) + share
    share = torch.where((share >= 0) & (share <= 1), share, torch.nan)
    of_first = torch.where(first.valid, share, 0.0)
    of_other = torch.where(other.valid, 1 - share, 0.0)
    same = first.valid & other.valid & (first.target == other.target)
    of_first = torch.where(same, of_first + of_other, of_first)
    of_other = torch.where(same, 0.0, of_other)
    swap = other.valid & (~first.valid | (of_other > of_first))
    swap = (swap & ~first.bad) | other.bad

    shares = torch.stack(
        [torch.where(swap, of_other, of_first), torch.where(swap, of_first, of_other)]
    ).to(dtype)
    second = torch.where(swap, first.target, other.target)
    targets = torch.where(swap, targets2.long(), targets.long())
    options = options._replace(second=second, shares=shares)
    if options.reduction == "mean" and options.normalizer is None:
        rows = classify(targets, num_classes, options.ignore_index)
        weights = class_weights(options.weight, num_classes, shares)
        at_target, at_second, _ = _weights_at(rows, options, weights)
        row_weight = at_target if at_second is None else at_target + at_second
        row_weight = torch.where(rows.valid, row_weight, 0.0)
        options = options._replace(normalizer=ordered_sum(row_weight.double().flatten()))
    return targets, options


def _weights_at(
    rows: Rows, options: Options, weights: Tensor
) -> tuple[Tensor, Tensor | None, Number]:
    """Three values for each row: the weight of its target, with MixUp that of its second target,
    and the sum of its shares."""
    at_target = weights[rows.target]
    if options.second is None or options.shares is None:
        return at_target, None, 1.0
    share, second_share = options.shares
    return at_target * share, weights[options.second] * second_share, share + second_share


def refuse_bad_targets(
    targets: Tensor, num_classes: int, ignore_index: int, name: str = ""
) -> None:
    """Raise IndexError for bad targets on the CPU only: elsewhere, looking would mean waiting for
    the device. name: the beginning of the message."""
    if targets.device.type != "cpu" or isinstance(targets, FakeTensor):
        return
    bad = classify(targets, num_classes, ignore_index).bad
    if torch.compiler.is_compiling():
        torch._assert_async(
            ~bad.any(), "a target is outside [0, number of classes) and not ignore_index"
        )
        return
    places = bad.nonzero()
    if len(places):
        row = tuple(places[0].tolist())
        raise IndexError(
            f"{name}target {int(targets[row])} of row {row} is outside [0, {num_classes}) and not "
            f"ignore_index {ignore_index}; {len(places)} such rows"
        )


@torch.no_grad()
def forward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    for_backward: bool = True,
) -> Forward:
    """logits [..., V], targets [...]; adds the batch to `meter`. What it returns does not depend on
    `for_backward`."""
    rows = classify(targets, logits.shape[-1], options.ignore_index)
    x = capped(logits, options.softcap)
    weights = class_weights(options.weight, x.shape[-1], x)
    result, loss_sum, weight_sum = loss_of(
        row_sums(x, rows, options, weights), rows, options, weights, meter is not None
    )
    if meter is not None:
        rank = ranks(logits, rows.target, pick(logits, rows.target))
        add_to_meter(meter, rows, result.row_max.isfinite(), rank, loss_sum, weight_sum)
        if meter.measures:
            measured = rows.valid & result.row_max.isfinite()
            found = row_measures(logits, x, rows.target, measured, meter.measures)
            add_measures(meter, rows.target, found)
    return result


def row_sums(x: Tensor, rows: Rows, options: Options, weights: Tensor) -> RowSums:
    """x: [..., V] after softcap. weights: [V]."""
    row_max = x.amax(-1)
    x = x - row_max[..., None]  # [..., V], none above 0
    return RowSums(
        row_max,
        ordered_sum(x.exp()).log(),
        pick(x, rows.target),
        None if options.second is None else pick(x, options.second),
        ordered_sum(x * weights) if is_on(options.label_smoothing) else None,
    )


def loss_of(
    sums: RowSums, rows: Rows, options: Options, weights: Tensor, has_meter: bool
) -> tuple[Forward, Tensor, Tensor]:
    """The loss of a batch, and the sums over its rows of their losses and of their weights."""
    row_max, row_log_sum = sums.row_max, sums.row_log_sum
    e = _factor(options.label_smoothing, row_max)
    z = _factor(options.z_loss, row_max)
    at_target, at_second, share_sum = _weights_at(rows, options, weights)
    row_weight = at_target
    row_loss = at_target * (1 - e) * (row_log_sum - sums.target)
    if sums.second is not None and at_second is not None:
        row_weight = at_target + at_second
        of_second = at_second * (1 - e) * (row_log_sum - sums.second)
        # Not products with 0: beside a -inf logit the other factor is inf.
        finite = row_max.isfinite()
        row_loss = torch.where(finite & (at_target == 0), 0.0, row_loss)
        row_loss = row_loss + torch.where(finite & (at_second == 0), 0.0, of_second)
    if sums.weighted is not None:
        smooth = ordered_sum(weights) * row_log_sum - sums.weighted
        # Not a product with e = 0: beside a -inf logit `smooth` is inf.
        row_loss = row_loss + torch.where(
            rows.valid & (e > 0), e / len(weights) * share_sum * smooth, 0.0
        )
    if is_on(z):
        row_loss = row_loss + z * share_sum * (row_max + row_log_sum).square()

    row_loss = torch.where(rows.valid, row_loss, 0.0)
    loss_sum = ordered_sum(row_loss.double().flatten())
    weight_sum = ordered_sum(torch.where(rows.valid, row_weight, 0.0).double().flatten())
    denominator = torch.ones_like(loss_sum)
    if options.reduction == "mean":
        # The sum with zeros brings a number, or a tensor of any dtype on the CPU, to the logits'
        # device.
        given = options.normalizer
        denominator = weight_sum if given is None else torch.zeros_like(loss_sum) + given
    # A meter will report bad targets; without one, the loss itself has to.
    unknown = torch.zeros_like(rows.bad) if has_meter else rows.bad
    if options.reduction == "none":
        loss = torch.where(unknown, torch.nan, row_loss)
    else:
        loss = torch.where(
            unknown.any() | (denominator == 0), torch.nan, loss_sum / denominator
        ).to(row_max.dtype)
    return Forward(loss, row_max, row_log_sum, denominator), loss_sum, weight_sum


def backward(
    grad_output: Tensor,  # shaped as the loss
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    denominator: Tensor,
    options: Options,
    first_class: int = 0,
    num_classes: int | None = None,
) -> Tensor:
    """d(loss)/d(logits) [..., V] times grad_output, in the logits' dtype, rounded once.

    first_class, num_classes: for logits that hold only V of the classes, the index of the first of
    these and the number of all.
    """
    num_classes = logits.shape[-1] if num_classes is None else num_classes
    rows = classify(targets, num_classes, options.ignore_index)
    x = capped(logits, options.softcap)
    of_softmax, at_target, at_second, everywhere = row_factors(
        grad_output, rows, row_max, row_log_sum, denominator, options, num_classes
    )

    # In place from the softmax on: at large V new memory costs more than the arithmetic.
    grad = x - row_max[..., None]
    flushes = x.dtype == torch.float32
    if flushes:  # rows that are not finite stay NaN
        nothing = (grad <= LOWEST_EXPONENT) & row_log_sum.isfinite()[..., None]
        grad.masked_fill_(nothing, -torch.inf)
    grad.sub_(row_log_sum[..., None]).exp_().mul_(of_softmax[..., None])
    # No scatter: torch's compiler loses it beside what follows when it uses several threads.
    classes = torch.arange(first_class, first_class + x.shape[-1], device=x.device)
    grad.sub_(torch.where(classes == rows.target[..., None], at_target[..., None], 0.0))
    if options.second is not None and at_second is not None:
        grad.sub_(torch.where(classes == options.second[..., None], at_second[..., None], 0.0))
    if everywhere is not None:
        weights = class_weights(options.weight, num_classes, x)
        own = weights[first_class : first_class + x.shape[-1]]
        grad.addcmul_(everywhere[..., None], own, value=-1)
    if options.softcap is not None:
        grad.mul_(1 - (x / options.softcap).square())
    if flushes:
        grad.masked_fill_(grad.abs() < SMALLEST, 0.0)
    counts = rows.valid & (denominator != 0)
    return grad.masked_fill_(~counts[..., None], 0.0).to(logits.dtype)


def row_factors(
    grad_output: Tensor,  # shaped as the loss
    rows: Rows,
    row_max: Tensor,
    row_log_sum: Tensor,
    denominator: Tensor,
    options: Options,
    num_classes: int,
) -> RowFactors:
    """All that the gradient of a row depends on besides its logits."""
    e = _factor(options.label_smoothing, row_max)
    z = _factor(options.z_loss, row_max)
    weights = class_weights(options.weight, num_classes, row_max)
    scale = grad_output.to(row_max.dtype) / denominator.to(row_max.dtype)  # [] or [...]
    at_target, at_second, share_sum = _weights_at(rows, options, weights)
    at_target = at_target * (1 - e) * scale  # [...]
    of_softmax = at_target
    if at_second is not None:
        at_second = at_second * (1 - e) * scale
        of_softmax = of_softmax + at_second
    everywhere = None
    if is_on(e):
        everywhere = e / num_classes * share_sum * scale
        of_softmax = of_softmax + everywhere * ordered_sum(weights)
    if is_on(z):
        of_softmax = of_softmax + 2 * z * share_sum * (row_max + row_log_sum) * scale
    return RowFactors(of_softmax, at_target, at_second, everywhere)


@torch.no_grad()
def step(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: Number | None,
    out: Tensor | None,
) -> Tensor:
    """The gradient of the loss times grad_scale, into `out` (may be the logits); adds the batch to
    `meter`."""
    result = forward(logits, targets, options, meter)
    scale = first_gradient(result, grad_scale)
    grad = backward(scale, logits, targets, *result[1:], options)
    return grad if out is None else out.copy_(grad)


def first_gradient(result: Forward, grad_scale: Number | None) -> Tensor:
    """The gradient of the loss with which the backward pass of a step begins: float64 []."""
    one = torch.ones_like(result.denominator)
    return one if grad_scale is None else one * grad_scale


@torch.no_grad()
def record(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, options: Options) -> None:
    """Add a batch whose mean loss over valid rows is `loss` []."""
    rows = classify(targets, logits.shape[-1], options.ignore_index)
    valid = rows.valid.sum().double()
    loss_sum = torch.where(valid > 0, loss.double() * valid, 0.0)
    rank = ranks(logits, rows.target, pick(logits, rows.target))
    add_to_meter(meter, rows, logits.amax(-1).isfinite(), rank, loss_sum, valid)
    if meter.measures:
        measured = rows.valid & logits.amax(-1).isfinite()
        x = capped(logits, None)
        add_measures(
            meter, rows.target, row_measures(logits, x, rows.target, measured, meter.measures)
        )


def ranks(logits: Tensor, target: Tensor, target_logit: Tensor, first_class: int = 0) -> Tensor:
    """The number of classes among first_class, first_class + 1, ... that rank before the target of
    each row: those with a larger logit, and lower classes with an equal one. int32 [...]."""
    classes = torch.arange(first_class, first_class + logits.shape[-1], device=logits.device)
    lower_index = classes < target[..., None]
    bar = target_logit[..., None]
    ahead = torch.where(lower_index, logits >= bar, logits > bar)  # [..., V]
    return ahead.sum(-1, dtype=torch.int32)  # int64 would first widen all of `ahead`


def add_to_meter(
    meter: Meter, rows: Rows, finite: Tensor, rank: Tensor, loss_sum: Tensor, weight_sum: Tensor
) -> None:
    """finite, rank: [...], whether all logits of a row are, and the rank of its target from 0."""
    has_valid = rows.valid.any()
    counts = [rows.valid.sum(), rows.ignored.sum(), (rows.valid & ~finite).sum(), rows.bad.sum()]
    counts += [torch.ones_like(has_valid, dtype=torch.int64), has_valid]
    counts += [(rows.valid & finite & (rank < k)).sum() for k in meter.topk]
    batch_mean = torch.where(has_valid, loss_sum / weight_sum, 0.0)
    meter.sums[: len(SUMS)].add_(torch.stack([loss_sum, weight_sum, batch_mean]))
    seen = torch.stack([count.long() for count in counts])
    meter.counts[: len(seen)].add_(seen)


def capped(logits: Tensor, softcap: Number | None) -> Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def _factor(value: Number, x: Tensor) -> Number:
    return value.to(x.dtype) if isinstance(value, Tensor) else float(value)  # of numpy too


def is_on(factor: Number) -> bool:
    return isinstance(factor, Tensor) or factor != 0  # a tensor is never read on the host


def pick(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(-1, target[..., None])[..., 0]


def class_weights(weight: Tensor | None, classes: int, x: Tensor) -> Tensor:
    return x.new_ones(classes) if weight is None else weight.to(x.dtype)
