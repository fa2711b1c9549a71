"""Cross entropy by the compiled ops of `csrc/`, on the CPU and on CUDA: one op per call, the same
for both.

The ops check their arguments (csrc/call.cpp), and on the CPU the targets too, before they write
anything. They copy what their kernels cannot read as it is: odd strides, on CUDA also any class
stride but 1, odd addresses, class weights in another dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS, REDUCTIONS
from esper_kernels.meter import SUMS, Meter
from esper_kernels.ops.cross_entropy.memory import accumulators, gradient_like, loss_and_saved
from esper_kernels.ops.cross_entropy.reference import Number, Options


def forward(
    logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what `backward` needs if it will follow."""
    loss, saved = loss_and_saved(logits, targets, options.reduction, for_backward)
    _call(logits, targets, options, meter, loss=loss, saved=saved)
    return loss, saved


def backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    saved: Tensor,
    options: Options,
    first_class: int = 0,
    num_classes: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """first_class, num_classes: for logits that hold only V of the classes, the index of the first
    of these and the number of all; on the CPU only."""
    grad = _new_gradient(logits) if out is None else out
    numbers, tensors = _split((options.label_smoothing, options.z_loss, options.softcap))
    # the last arguments of the op, which have defaults, are left out if none of them is needed
    more: tuple[Tensor | int | None, ...] = tuple(tensors)
    if options.second is not None or num_classes is not None:
        numbers_as_tensors = tensors or [None] * 3
        more = (*numbers_as_tensors, options.second, options.shares, first_class, num_classes)
    torch.ops.esper.cross_entropy_backward.default(
        logits,
        targets,
        options.weight,
        options.ignore_index,
        numbers[0],
        numbers[1],
        numbers[2],
        INSTRUCTION_SETS.index(options.instruction_set),
        grad_output,
        saved,
        grad,
        *more,
    )
    return grad


def step(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: Number | None,
    out: Tensor | None,
) -> Tensor:
    grad = _new_gradient(logits) if out is None else out
    _call(logits, targets, options, meter, grad_scale=grad_scale, out=grad)
    return grad


def record(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, options: Options) -> None:
    seen = meter.empty_copy()
    _call(logits, targets, options, seen)
    meter.counts.add_(seen.counts)
    valid = seen.counts[0].double()
    mean = torch.where(valid > 0, loss.double(), 0.0)
    sums = torch.stack([mean * valid, valid, mean])
    meter.sums.add_(torch.cat([sums, seen.sums[len(SUMS) :]]))


def _call(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    *,
    grad_scale: Number | None = None,
    loss: Tensor | None = None,
    saved: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    (
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set,
        second,
        shares,
    ) = options
    numbers, tensors = _split((label_smoothing, z_loss, softcap, normalizer, grad_scale))
    if second is not None:
        tensors = (*(tensors or [None] * 5), second, shares)
    torch.ops.esper.cross_entropy.default(
        logits,
        targets,
        weight,
        ignore_index,
        numbers[0],
        numbers[1],
        numbers[2],
        REDUCTIONS.index(reduction),
        numbers[3],
        INSTRUCTION_SETS.index(instruction_set),
        1.0 if numbers[4] is None else numbers[4],
        *accumulators(meter),
        loss,
        saved,
        out,
        *tensors,
    )


def _new_gradient(logits: Tensor) -> Tensor:
    """New memory for the gradient: contiguous, or on the CPU with the strides of the logits if
    their classes are apart in memory."""
    if logits.is_cpu and logits.stride(-1) != 1:
        return gradient_like(logits, torch.preserve_format)
    return gradient_like(logits)


def _split(
    options: tuple[Number | None, ...],
) -> tuple[Sequence[float | None], Sequence[Tensor | None]]:
    """The numbers, with 0 in place of each tensor; and the tensors, with None in place of each
    number, or () if there are no tensors."""
    for option in options:
        if isinstance(option, Tensor):
            break
    else:
        return options, ()  # type: ignore[return-value]  # none is a tensor
    numbers = [0.0 if isinstance(x, Tensor) else x for x in options]
    return numbers, [x if isinstance(x, Tensor) else None for x in options]
