"""Linear cross entropy in chunks of rows, for every fused backend of cross entropy: the logits of
the whole batch never exist.

For each chunk: a matrix product into memory that the next chunk uses again, the fused step of the
backend in place on it, and a matrix product for each gradient that is wanted. On the CPU, products
are cut into panels of classes, and those of bfloat16 and float16 are computed in float32, because
torch's own are up to 200 times slower on processors without such arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from esper_kernels.meter import COUNTS, Meter
from esper_kernels.ops.cross_entropy.memory import gradient_like
from esper_kernels.ops.cross_entropy.reference import Number, Options, classify
from esper_kernels.ops.linear_cross_entropy import sizes
from esper_kernels.ops.linear_cross_entropy.reference import NO_TOTALS, Batch, Totals
from esper_kernels.ops.vocab_parallel.shard import ClassShard


def run(
    module: Any,  # a backend of cross entropy: a module such as `cpp`, or DividedClasses
    batch: Batch,
    options: Options,
    meter: Meter | None,
    scale: Number | None,
    totals: Totals,
    shard: ClassShard | None = None,
) -> Tensor:
    """Compute as `reference.run`. Ranks that divide the classes all have the same chunks."""
    wants_gradients = totals != NO_TOTALS
    is_per_row = options.reduction == "none"
    num_classes = len(batch.weight) if shard is None else shard.num_classes
    classes_of_rank = len(batch.weight) if shard is None else shard.even_share()
    copies = 2 if is_per_row and wants_gradients else 1
    divisor = _divisor(batch, options, num_classes)
    if options.reduction == "mean":
        options = options._replace(normalizer=divisor)  # that of the batch, not of each chunk
    # The chunks have a meter of their own, because the batch counts as one. It has the loss too.
    seen = Meter(batch.hidden.device, topk=()) if meter is None else meter.empty_copy()
    losses = torch.empty_like(batch.targets, dtype=torch.float32)
    for rows, logits in chunks(batch, copies, classes_of_rank):
        targets = batch.targets[rows]
        of_chunk = _options_of(rows, options)
        if wants_gradients and not is_per_row:
            grad = module.step(logits, targets, of_chunk, seen, scale, logits)
            add_gradients(grad, batch, rows, totals)
            continue
        loss, *saved = module.forward(logits, targets, of_chunk, seen, wants_gradients)
        losses[rows] = loss
        if wants_gradients:
            assert isinstance(scale, Tensor)  # [N]
            grad = module.backward(scale[rows], logits, targets, *saved, of_chunk)
            add_gradients(grad, batch, rows, totals)

    # A meter will report bad targets; without one, the loss itself has to.
    bad = classify(batch.targets, num_classes, options.ignore_index).bad
    unknown = bad if meter is None else torch.zeros_like(bad)
    if meter is not None:
        _add_batch(meter, seen)
    if is_per_row:
        return torch.where(unknown, torch.nan, losses)
    loss = torch.where(unknown.any() | (divisor == 0), torch.nan, seen.sums[0] / divisor)
    return loss.float()


def _options_of(rows: slice, options: Options) -> Options:
    """The options for some rows: with MixUp, their second targets and their shares."""
    if options.second is None or options.shares is None:
        return options
    shares = options.shares[:, rows].contiguous()
    return options._replace(second=options.second[rows], shares=shares)


def _divisor(batch: Batch, options: Options, num_classes: int) -> Tensor:
    """The divisor of the sum over all rows: float64 []."""
    one = torch.ones((), dtype=torch.float64, device=batch.hidden.device)
    if options.reduction != "mean":
        return one
    if options.normalizer is not None:
        return one * options.normalizer
    rows = classify(batch.targets, num_classes, options.ignore_index)
    if options.weight is None:
        return rows.valid.sum().double()
    return torch.where(rows.valid, options.weight[rows.target].float(), 0.0).double().sum()


def chunks(batch: Batch, copies: int, classes: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and their logits in memory that all chunks share.

    copies: how many chunks of logits will exist at a time.
    classes: for how many classes the size of a chunk is chosen, by default those of the weight.
    """
    hidden, weight, bias, _ = batch
    count = len(hidden)
    most = sizes.chunk_rows(
        count,
        len(weight) if classes is None else classes,
        hidden.shape[1],
        copies * hidden.element_size(),
        _product_dtype(hidden) != hidden.dtype,
        sizes.device_bytes(hidden.device),
    )
    memory = gradient_like(hidden.new_empty(1).expand(most, len(weight)))
    for start in range(0, count, most):
        rows = slice(start, min(start + most, count))
        logits = memory[: rows.stop - start]
        operand = hidden[rows].to(_product_dtype(hidden))
        for panel in _panels(weight):
            part = None if bias is None else bias[panel].to(operand.dtype)
            _linear(operand, weight[panel].to(operand.dtype), part, logits[:, panel])
        yield rows, logits


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    product = out if out.dtype == hidden.dtype else hidden.new_empty(out.shape)
    if bias is None:
        torch.mm(hidden, weight.t(), out=product)
    else:
        torch.addmm(bias, hidden, weight.t(), out=product)
    if product is not out:
        out.copy_(product)


def add_gradients(grad: Tensor, batch: Batch, rows: slice, totals: Totals) -> None:
    """grad: of the logits of these rows."""
    hidden, weight, _, _ = batch
    dtype = _product_dtype(hidden)
    operand = hidden[rows].to(dtype)
    if totals.bias is not None:
        totals.bias.add_(grad.sum(0, dtype=totals.bias.dtype))
    if totals.weight is None and totals.hidden is None:
        return
    sum_dtype = torch.promote_types(dtype, torch.float32)
    grad_hidden = torch.zeros_like(operand, dtype=sum_dtype)
    for panel in _panels(weight):
        part = grad[:, panel].to(dtype)
        if totals.hidden is not None:
            _add_product(grad_hidden, part, weight[panel].to(dtype))
        if totals.weight is not None:
            _add_product(totals.weight[panel], part.t(), operand)
    if totals.hidden is not None:
        totals.hidden[rows] = grad_hidden


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a rounding of the product to the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which matrix products are computed."""
    return torch.promote_types(hidden.dtype, torch.float32) if hidden.is_cpu else hidden.dtype


def _panels(weight: Tensor) -> Iterator[slice]:
    """The classes that one product takes at a time."""
    classes = len(weight)
    size = sizes.CPU_PANEL if weight.is_cpu else max(1, classes)
    return (slice(start, start + size) for start in range(0, classes, size))


def _add_batch(meter: Meter, seen: Meter) -> None:
    """Add what the chunks of one batch added to `seen`."""
    counts = dict(zip(COUNTS, seen.counts[: len(COUNTS)].unbind(), strict=True))
    has_valid = counts["valid"] > 0
    counts["batches"].fill_(1)
    counts["batches_with_valid"].copy_(has_valid)
    seen.sums[2] = torch.where(has_valid, seen.sums[0] / seen.sums[1], 0.0)
    meter.sums.add_(seen.sums)
    meter.counts.add_(seen.counts)
