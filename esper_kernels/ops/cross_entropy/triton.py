"""Cross entropy by the Triton kernels of `triton_kernels`: one launch per batch computes the loss,
the gradient and the metrics that are wanted.

A second launch comes first where the gradient of a mean needs the weights of more rows than each
program should add up by itself. `torch.compile` and torch's dispatch modes see the launch as an op
of its own.

Long functions: `_launch` is mostly the list of a kernel's arguments.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from esper_kernels.measures import ROW_SUMS
from esper_kernels.meter import COUNTS, Meter
from esper_kernels.ops.cross_entropy import launch
from esper_kernels.ops.cross_entropy.measures import RowMeasures, add_measures
from esper_kernels.ops.cross_entropy.memory import accumulators, gradient_like, loss_and_saved
from esper_kernels.ops.cross_entropy.reference import Number, Options, classify
from esper_kernels.values import are_fake, has_plain_rows, materialized


def forward(
    logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what `backward` needs if it will follow."""
    loss, saved = loss_and_saved(logits, targets, options.reduction, for_backward)
    _call(logits, targets, options, meter, loss=loss, saved=saved)
    return loss, saved


def backward(
    grad_output: Tensor, logits: Tensor, targets: Tensor, saved: Tensor, options: Options
) -> Tensor:
    grad = gradient_like(logits)
    _call(
        logits,
        targets,
        options,
        None,
        grad_scale=grad_output.contiguous(),
        saved_in=saved,
        grad=grad,
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
    grad = gradient_like(logits) if out is None else out
    written = grad if has_plain_rows(grad) else gradient_like(logits)
    scale = 1.0 if grad_scale is None else grad_scale
    _call(logits, targets, options, meter, grad_scale=scale, grad=written)
    return grad if written is grad else grad.copy_(written)


def record(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, options: Options) -> None:
    _call(logits, targets, options, meter, recorded=loss)


def _call(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: Number | None = None,
    saved_in: Tensor | None = None,
    recorded: Tensor | None = None,
    loss: Tensor | None = None,
    saved: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    normalizer = options.normalizer if options.reduction == "mean" else 1.0
    values = (options.label_smoothing, options.z_loss, options.softcap, normalizer, grad_scale)
    numbers = [math.nan if x is None or isinstance(x, Tensor) else float(x) for x in values]
    numbers[:2] = [x or math.nan for x in numbers[:2]]  # a factor of 0 is left out
    given_tensors = (*values, options.weight, saved_in, recorded, options.second, options.shares)
    tensors = [materialized(x.detach()) if isinstance(x, Tensor) else None for x in given_tensors]
    logits = materialized(logits)
    targets = materialized(targets)
    *meters, topk, plan = accumulators(meter)
    predicted = None
    measures = None
    if meter is not None and plan:
        predicted = logits.new_empty(targets.shape, dtype=torch.int32)
        measures = logits.new_zeros(1 + len(ROW_SUMS), *targets.shape, dtype=torch.float32)
    run = _op if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() else _launch
    per_row = options.reduction == "none"
    run(
        logits,
        targets,
        numbers,
        tensors,
        options.ignore_index,
        topk,
        per_row,
        loss,
        saved,
        grad,
        predicted,
        measures,
        bool(meter and meter.measures and meter.measures.entropy),
        *meters,
    )
    if meter is not None and predicted is not None and measures is not None:
        target = classify(targets, logits.shape[-1], options.ignore_index).target
        confidence, *row_sums = measures.unbind()
        add_measures(meter, target, RowMeasures(predicted, confidence, tuple(row_sums)))


def _row_stride(x: Tensor) -> int | None:
    """Elements from a row of x, which has plain rows, to the next; None where rows are not evenly
    spaced, as in logits[:, :-1]."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() == 3:
        return x.stride(1) if x.stride(0) == x.shape[1] * x.stride(1) else None
    return x.stride(0) if x.dim() == 2 else 0


def _layout(logits: Tensor, grad: Tensor) -> tuple[int, tuple[int | None, ...]]:
    """The unit in which strides are passed; then the inner size, None where rows are evenly spaced,
    and the outer and inner strides of logits and gradient, in that unit.

    The unit is a power of 2, in elements: it tells the compiler the alignment, but not the stride.
    """
    even = _row_stride(logits)
    grad_even = _row_stride(grad)
    if even is None or grad_even is None:
        strides = (*logits.stride()[:2], *grad.stride()[:2])
    else:
        strides = (0, even, 0, grad_even)
    unit = math.gcd(16, *strides)
    return unit, (
        logits.shape[1] if strides[0] or strides[2] else None,
        *(stride // unit for stride in strides),
    )


def _same_phase(logits: Tensor, grad: Tensor) -> bool:
    """Whether each row of the gradient begins as far behind a 16 byte boundary as that of the
    logits."""
    distances = [grad.data_ptr() - logits.data_ptr()]
    strides = zip(logits.stride()[:-1], grad.stride()[:-1], logits.shape[:-1], strict=True)
    distances += [(x - g) * logits.element_size() for x, g, size in strides if size > 1]
    return all(distance % 16 == 0 for distance in distances)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of second-level cache."""
    if device.type == "cpu":
        return 2, 1 << 20  # for the interpreter, as if it had them
    facts = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return facts.gpu_subslice_count, 0  # torch does not report the cache
    return facts.multi_processor_count, facts.L2_cache_size


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def _launch(
    logits: Tensor,
    targets: Tensor,
    # label smoothing, z-loss, softcap, normalizer, grad_scale; NaN for none
    numbers: Sequence[float],
    # the same where they are tensors; weight, saved_in, recorded, second, shares
    tensors: Sequence[Tensor | None],
    ignore_index: int,
    topk: Sequence[int],
    per_row: bool,
    loss: Tensor | None,
    saved_out: Tensor | None,
    grad: Tensor | None,
    predicted: Tensor | None,  # int32 [...]
    measures: Tensor | None,  # float32 [5, ...]
    entropy: bool,
    sums: Tensor | None,
    counts: Tensor | None,
    ticket: Tensor | None,
) -> None:
    from esper_kernels.ops.cross_entropy import triton_kernels as kernels

    if are_fake((logits, targets, *tensors, grad)):
        return
    device = logits.device
    rows = targets.numel()
    classes = logits.shape[-1]
    # Tensors of the device go by pointer; those of the CPU are read, which waits for nothing.
    smoothing, z_loss, softcap, normalizer, grad_scale = (
        (None if math.isnan(number) else number)
        if x is None
        else x
        if x.device == device
        else float(x)
        for number, x in zip(numbers, tensors[:5], strict=True)
    )
    weight, saved_in, recorded, second, shares = tensors[5:]
    weight = None if weight is None else weight.contiguous()
    logits = logits if has_plain_rows(logits) else logits.contiguous()
    targets = targets.contiguous()
    unit, layout = _layout(logits, logits if grad is None else grad)
    shape = {"V": classes, "IGNORE": ignore_index}
    has_options = not (weight is None and smoothing is None and softcap is None)
    burdens = has_options + (predicted is not None)
    sizes = (rows, classes, logits.element_size(), targets.element_size(), burdens)
    chosen = launch.choose(*sizes, *_device(device))
    # Triton's own default, which it warns will change
    options: dict[str, Any] = {"enable_fp_fusion": True}
    partials = None
    with _current(device):
        if counts is not None or (loss is not None and not per_row):
            columns = len(COUNTS) + len(topk)
            partials = torch.empty(columns * chosen.programs, dtype=torch.float64, device=device)
            ticket = torch.zeros(1, dtype=torch.int32, device=device) if ticket is None else ticket
        if grad is not None and saved_in is None and normalizer is None and chosen.count_first:
            counted = torch.empty(launch.COUNT_PROGRAMS, dtype=torch.float64, device=device)
            kernels.count[(launch.COUNT_PROGRAMS,)](
                targets, weight, counted, rows, **shape, BLOCK=1024, **options
            )
            normalizer = counted.sum()
        if torch.version.cuda:
            options["maxnreg"] = chosen.registers
        inputs = (
            logits,
            targets,
            second,
            shares,
            weight,
            smoothing,
            z_loss,
            softcap,
            normalizer,
            grad_scale,
            saved_in,
            recorded,
        )
        kernels.batch[(chosen.programs,)](
            *(*inputs, loss, saved_out, grad, predicted, measures),
            *(sums, counts, partials, ticket, rows, *layout),
            **shape,
            UNIT=unit,
            TOPK=tuple(topk),
            PER_ROW=per_row,
            ROWS=chosen.rows,
            BLOCK=chosen.block,
            RESIDENT=chosen.resident,
            COUNT_BLOCK=256 * chosen.warps,
            SAME_PHASE=not chosen.resident and grad is not None and _same_phase(logits, grad),
            ENTROPY=entropy,
            num_warps=chosen.warps,
            **options,
        )


_op = torch.library.custom_op(
    "esper::cross_entropy_triton",
    _launch,
    mutates_args=(
        "loss",
        "saved_out",
        "grad",
        "predicted",
        "measures",
        "sums",
        "counts",
        "ticket",
    ),
)
_op.register_fake(lambda *arguments: None)
