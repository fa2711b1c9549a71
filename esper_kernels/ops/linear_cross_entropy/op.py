"""One call of a backend as one function of tensors and numbers, which `torch.compile` sees as an op
of its own."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from esper_kernels.meter import Meter, meter_of
from esper_kernels.ops.cross_entropy import cpp, triton
from esper_kernels.ops.cross_entropy.reference import Number, Options, refuse_bad_targets
from esper_kernels.ops.linear_cross_entropy import chunked, reference
from esper_kernels.ops.linear_cross_entropy.arguments import without_autocast
from esper_kernels.ops.linear_cross_entropy.reference import Batch, Totals
from esper_kernels.ops.vocab_parallel.divided import DividedClasses
from esper_kernels.ops.vocab_parallel.shard import ClassShard

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
    shard: ClassShard | None = None,
) -> Tensor:
    """Compute as `reference.run`, with the batch converted to `dtype`; raises IndexError for bad
    targets on the CPU before anything is written.

    `totals` of any dtype are added to, and rounded once: the sum is float32. With a shard the total
    of hidden is that of the classes of all ranks, the others are those of this rank.
    """
    shape = batch.targets.shape if options.reduction == "none" else ()
    loss_dtype = torch.promote_types(dtype, torch.float32)
    loss = batch.hidden.new_empty(shape, dtype=loss_dtype)
    if torch.compiler.is_compiling():
        _call_op(backend, batch, dtype, options, meter, scale, totals, loss)
    else:
        _write(backend, batch, dtype, options, meter, scale, totals, loss, shard)
    return loss


@torch.no_grad()
def _write(
    backend: str,
    batch: Batch,
    dtype: torch.dtype,
    options: Options,
    meter: Meter | None,
    scale: Number | None,
    totals: Totals,
    loss: Tensor,
    shard: ClassShard | None,
) -> None:
    """Write the loss, and add to `totals` and `meter`."""
    hidden, weight, bias, targets = batch
    num_classes = len(weight) if shard is None else shard.num_classes
    refuse_bad_targets(targets, num_classes, options.ignore_index)
    with without_autocast(hidden):
        converted = Batch(
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets,
        )
        sum_dtype = torch.promote_types(dtype, torch.float32)
        sums = Totals(
            totals.hidden if shard is None else _empty_sum(totals.hidden, sum_dtype),
            _sum_for(totals.weight, sum_dtype),
            _sum_for(totals.bias, sum_dtype),
        )
        compute = _BACKENDS[backend]
        if shard is not None:
            compute = _for_divided_classes(backend, shard, dtype)
        loss.copy_(compute(converted, options, meter, scale, sums))
        if shard is not None and totals.hidden is not None and sums.hidden is not None:
            dist.all_reduce(sums.hidden, group=shard.group)
            totals.hidden.copy_(sums.hidden)
        _add_rounded(totals.weight, sums.weight)
        _add_rounded(totals.bias, sums.bias)


def _for_divided_classes(
    backend: str, shard: ClassShard, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """Run in chunks, also with the backend `eager`, which may be all that a GPU has for divided
    classes."""
    divided = DividedClasses.served_by(backend, shard)
    if dtype == torch.float64:
        return partial(reference.run, module=divided)
    return partial(chunked.run, divided, shard=shard)


def _empty_sum(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _call_op(
    backend: str,
    batch: Batch,
    dtype: torch.dtype,
    options: Options,
    meter: Meter | None,
    scale: Number | None,
    totals: Totals,
    loss: Tensor,
) -> None:
    """`_write` as a compiled graph takes it."""
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
    _op(
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


def _run_op(
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
    meter = None
    if sums is not None and counts is not None:
        meter = meter_of(hidden.device, topk, measures)
        meter.sums = sums
        meter.counts = counts
    batch = Batch(hidden, weight, bias, targets)
    totals = Totals(grad_hidden, grad_weight, grad_bias)
    _write(backend, batch, dtype, options, meter, scale, totals, loss, None)


def _sum_for(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The memory that the chunks add to: the gradient itself, unless its dtype would round each
    sum."""
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
    _run_op,
    mutates_args=("sums", "counts", "loss", "grad_hidden", "grad_weight", "grad_bias"),
)
_op.register_fake(lambda *arguments: None)
