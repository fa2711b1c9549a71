"""Cross entropy by the compiled ops of `csrc/`, on the CPU and on CUDA: one op a call, the same for both.

On the CPU the op looks at the targets before it writes anything, and where it finds a bad one, the reference names it.
"""

from typing import Any

import torch
from torch import Tensor

from esper_kernels.backends import direct
from esper_kernels.config import INSTRUCTION_SET_NAMES
from esper_kernels.meter import Meter
from esper_kernels.native import Road
from esper_kernels.ops.cross_entropy.reference import Number, Options, refuse_bad_targets

_LARGE = 1 << 20  # elements: below, the C library has memory at hand
_REDUCTIONS = ("mean", "sum", "none")  # in the order of csrc/call.h


def forward(logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, keep: bool) -> tuple[Tensor, ...]:
    """The loss and, to keep for `backward`, float32 [2 N + 1]: two numbers a row, then the denominator."""
    loss = logits.new_empty(targets.shape if options.reduction == "none" else (), dtype=torch.float32)
    kept = logits.new_empty(2 * targets.numel() + 1, dtype=torch.float32) if keep else None
    _call(logits, targets, options, meter, loss=loss, kept=kept)
    return (loss,) if kept is None else (loss, kept)


def backward(grad_output: Tensor, logits: Tensor, targets: Tensor, kept: Tensor, options: Options) -> Tensor:
    grad, road = _fresh_like(logits), direct() if logits.is_cpu else None
    if road is not None and road.cross_entropy_backward(logits, targets, *options, grad_output, kept, grad):
        return grad
    torch.ops.esper.cross_entropy_backward.default(
        grad_output.float().contiguous(),
        *_inputs(logits, targets, options),
        _numbers(options.label_smoothing, options.z_loss),
        INSTRUCTION_SET_NAMES.index(options.instruction_set),
        kept,
        grad,
    )
    return grad


def step(
    logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, grad_scale: Number, out: Tensor | None
) -> Tensor:
    grad = _fresh_like(logits) if out is None else out
    written = _followable(grad)  # a copy where there are more leading dimensions than the op follows
    _call(logits, targets, options, meter, grad_scale=grad_scale, out=written)
    return grad if written is grad else grad.copy_(written)


def record(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, options: Options) -> None:
    seen = Meter(meter.device, topk=meter.topk)
    _call(logits, targets, options, seen)
    meter.counts.add_(seen.counts)
    valid = seen.counts[0].double()
    mean = torch.where(valid > 0, loss.double(), 0.0)
    meter.sums.add_(torch.stack([mean * valid, valid, mean]))


# The direct road: the checked call in one step past the dispatcher. These give None, and have written nothing, for
# what they leave to the functions above: `backends.direct` says when to try them.


def direct_forward(
    road: Road, logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, keep: bool
) -> tuple[Tensor, ...] | None:
    if type(targets) is not Tensor:
        return None
    loss = torch.empty(targets.shape if options.reduction == "none" else (), dtype=torch.float32)
    kept = torch.empty(2 * targets.numel() + 1, dtype=torch.float32) if keep else None
    if not road.cross_entropy(logits, targets, *options, None, *_accumulators(meter), loss, kept, None):
        return None
    return (loss,) if kept is None else (loss, kept)


def direct_step(
    road: Road,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: Number | None,
    out: Tensor | None,
    inplace: bool,
) -> Tensor | None:
    if options.reduction == "none":
        return None
    if out is None:
        if inplace and logits.requires_grad and logits.is_leaf:
            return None
        written = logits if inplace else _fresh_like(logits)
    elif inplace or out is logits or type(out) is not Tensor or out.requires_grad:
        return None
    else:
        written = out
    if not road.cross_entropy(logits, targets, *options, grad_scale, *_accumulators(meter), None, None, written):
        return None
    if inplace or out is not None:
        torch.autograd.graph.increment_version(written)
    return written.detach() if inplace else written


def _call(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    *,
    grad_scale: Number | None = None,
    loss: Tensor | None = None,
    kept: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    try:
        torch.ops.esper.cross_entropy.default(
            *_inputs(logits, targets, options),
            _plain(options.normalizer, otherwise=-1.0),
            _plain(grad_scale, otherwise=1.0),
            _numbers(options.label_smoothing, options.z_loss, options.normalizer, grad_scale),
            _REDUCTIONS.index(options.reduction),
            INSTRUCTION_SET_NAMES.index(options.instruction_set),
            *_accumulators(meter),
            loss,
            kept,
            out,
            None if meter is None else meter.ticket,
        )
    except RuntimeError:
        if not torch.compiler.is_compiling():
            refuse_bad_targets(targets, logits.shape[-1], options.ignore_index)
        raise


def _fresh_like(logits: Tensor) -> Tensor:
    """Memory for the gradient [..., V], contiguous."""
    grad = logits.new_empty(logits.shape)
    if grad.numel() > _LARGE and grad.is_cpu and (road := direct()) is not None:
        road.use_huge_pages(grad)
    return grad


def _followable(x: Tensor) -> Tensor:
    """x [..., V] itself where the op can follow its strides, else a copy.

    A copy of logits whose classes lie apart costs one more read and write of them: the rows are then read three
    times from the cache, and a strided row would not stay there.
    """
    if x.is_contiguous() or (x.dim() <= 3 and (x.stride(-1) == 1 or x.shape[-1] == 1)):
        return x
    return x.contiguous()


def _inputs(logits: Tensor, targets: Tensor, options: Options) -> tuple[Any, ...]:
    """What both ops are given, in their order."""
    weight = None if options.weight is None else options.weight.detach().float().contiguous()
    numbers = [_plain(x, otherwise=0.0) for x in (options.label_smoothing, options.z_loss, options.softcap)]
    return _followable(logits), targets.contiguous(), weight, options.ignore_index, *numbers


def _accumulators(meter: Meter | None) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """In the order of the op and of the road."""
    return (None, None, ()) if meter is None else (meter.sums, meter.counts, meter.topk)


def _plain(x: Number | None, otherwise: float) -> float:
    return otherwise if x is None or isinstance(x, Tensor) else float(x)


def _numbers(*given: Number | None) -> list[Tensor | None]:
    """The options that are tensors, None for the others, so that a schedule does not recompile; [] without any."""
    tensors = [x.detach() if isinstance(x, Tensor) else None for x in given]
    if all(x is None for x in tensors):
        return []
    readable = (torch.float32, torch.float64)
    return [x if x is None or x.dtype in readable else x.double() for x in tensors]
