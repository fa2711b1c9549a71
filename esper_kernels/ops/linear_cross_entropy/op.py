"""One call of a backend as one function of tensors and numbers, which `torch.compile` sees as an op
of its own."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from esper_kernels.meter import Meter, meter_of
from esper_kernels.ops.cross_entropy import cpp, triton
from esper_kernels.ops.cross_entropy.reference import Number, Options, refuse_bad_targets
from esper_kernels.ops.linear_cross_entropy import chunked, reference
from esper_kernels.ops.linear_cross_entropy.arguments import without_autocast
from esper_kernels.ops.linear_cross_entropy.reference import Batch, Totals

_PART = 4096  # classes
_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "eager": reference.run,
    "cpp": partial(chunked.run, cpp),
    "triton": partial(chunked.run, triton),
    "cuda": partial(chunked.run, cpp),
}


def run(
    backend: str,
    batch: Batch,
    dtype: torch.dtype,
    options: Options,
    meter: Meter | None,
    scale: Number | None,
    totals: Totals,
) -> Tensor:
    """As `reference.run`, with the batch converted to `dtype`; raises IndexError for bad targets on
    the CPU before anything is written.

    `totals` of any dtype are added to, and rounded once: the sum is float32.
    """
    shape = batch.targets.shape if options.reduction == "none" else ()
    loss_dtype = torch.promote_types(dtype, torch.float32)
    loss = batch.hidden.new_empty(shape, dtype=loss_dtype)
    values = (
        options.label_smoothing,
        options.z_loss,
        options.softcap,
        options.normalizer,
        scale,
    )
    numbers = [math.nan if x is None or isinstance(x, Tensor) else float(x) for x in values]
    given_tensors = (*values, options.weight, options.second, options.shares)
    tensors = [x if isinstance(x, Tensor) else None for x in given_tensors]
    call = _op if torch.compiler.is_compiling() else _run
    call(
        backend,
        *batch,
        dtype,
        numbers,
        tensors,
        options.ignore_index,
        options.reduction,
        options.instruction_set,
        () if meter is None else meter.topk,
        () if meter is None else meter.measures or (),
        None if meter is None else meter.sums,
        None if meter is None else meter.counts,
        loss,
        *totals,
    )
    return loss


@torch.no_grad()
def _run(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    # label smoothing, z-loss, softcap, normalizer, scale; NaN for none
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],  # the same where they are tensors; weight, second, shares
    ignore_index: int,
    reduction: str,
    instruction_set: str,
    topk: Sequence[int],
    measures: Sequence[int],
    sums: Tensor | None,
    counts: Tensor | None,
    loss: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    smoothing, z_loss, softcap, normalizer, scale = (
        (None if math.isnan(number) else number) if x is None else x
        for number, x in zip(numbers, tensors[:5], strict=True)
    )
    options = Options(
        tensors[5],
        ignore_index,
        0.0 if smoothing is None else smoothing,
        0.0 if z_loss is None else z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set,
        *tensors[6:],
    )
    refuse_bad_targets(targets, len(weight), ignore_index)
    meter = None
    if sums is not None and counts is not None:
        meter = meter_of(hidden.device, topk, measures)
        meter.sums = sums
        meter.counts = counts
    with without_autocast(hidden):
        batch = Batch(
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets,
        )
        sum_dtype = torch.promote_types(dtype, torch.float32)
        totals = Totals(
            grad_hidden, _sum_for(grad_weight, sum_dtype), _sum_for(grad_bias, sum_dtype)
        )
        loss.copy_(_BACKENDS[backend](batch, options, meter, scale, totals))
        _add_rounded(grad_weight, totals.weight)
        _add_rounded(grad_bias, totals.bias)


def _sum_for(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the chunks add to: the gradient itself, unless it would round each sum."""
    if gradient is None or gradient.dtype == dtype:
        return gradient
    return torch.zeros_like(gradient, dtype=dtype)


def _add_rounded(gradient: Tensor | None, total: Tensor | None) -> None:
    if gradient is None or total is None or total is gradient:
        return
    # In parts: a sum of two dtypes takes temporary memory for its operands and its result.
    for part, part_of_total in zip(gradient.split(_PART), total.split(_PART), strict=True):
        part.add_(part_of_total)


_op = torch.library.custom_op(
    "esper::linear_cross_entropy",
    _run,
    mutates_args=("sums", "counts", "loss", "grad_hidden", "grad_weight", "grad_bias"),
)
_op.register_fake(lambda *arguments: None)
