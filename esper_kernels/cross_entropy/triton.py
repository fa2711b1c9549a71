"""Cross entropy by the Triton kernels of `triton_kernels`: one launch a batch, whatever is asked of it.

Two where the gradient of a mean needs the weights of more rows than every program can look through by itself.
`torch.compile` sees the launches as ops of their own.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from esper_kernels.cross_entropy import launch
from esper_kernels.cross_entropy.reference import Options
from esper_kernels.meter import COUNTS, Meter

_OPTIONS = {"enable_fp_fusion": True}  # Triton's own default, which it warns is going to change
_INTERPRETED = (2, 1 << 20)  # multiprocessors and bytes of cache, as if the CPU had them


def forward(logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, keep: bool) -> tuple[Tensor, ...]:
    """The loss and, to keep for `backward`, float32 [2 N + 1]: maximum and sum of a row, then the weights' sum."""
    per_row = options.reduction == "none"
    loss = logits.new_empty(targets.shape if per_row else (), dtype=torch.float32)
    kept = logits.new_empty(2 * targets.numel() + 1, dtype=torch.float32) if keep else None
    _call(logits, targets, options, meter, losses=loss if per_row else None, loss=None if per_row else loss, kept=kept)
    return (loss,) if kept is None else (loss, kept)


def backward(grad_output: Tensor, logits: Tensor, targets: Tensor, kept: Tensor, options: Options) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    run = _backward_op if torch.compiler.is_compiling() else _backward
    run(
        grad_output.contiguous() if options.reduction == "none" else grad_output,
        logits,
        targets,
        options.weight,
        *_numbers(options, None),
        options.softcap,
        options.ignore_index,
        kept,
        grad,
    )
    return grad


def step(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    grad_scale: float | Tensor | None,
    out: Tensor | None,  # may be the logits
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    written = grad if _followed(grad) else torch.empty_like(grad, memory_format=torch.contiguous_format)
    _call(logits, targets, options, meter, grad_scale=grad_scale, grad=written)
    return grad if written is grad else grad.copy_(written)


def record(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, options: Options) -> None:
    _call(logits, targets, options, meter, recorded=loss)


def _call(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    meter: Meter | None,
    *,
    grad_scale: float | Tensor | None = None,
    recorded: Tensor | None = None,
    losses: Tensor | None = None,
    loss: Tensor | None = None,
    kept: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    run = _batch_op if torch.compiler.is_compiling() else _batch
    run(
        logits,
        targets,
        options.weight,
        *_numbers(options, grad_scale),
        options.softcap,
        options.ignore_index,
        () if meter is None else meter.topk,
        recorded,
        losses,
        loss,
        kept,
        grad,
        None if meter is None else meter.sums,
        None if meter is None else meter.counts,
        None if meter is None else meter.ticket,
    )


def _numbers(options: Options, grad_scale: float | Tensor | None) -> tuple[list[float], list[Tensor | None]]:
    """Label smoothing, z-loss, normalizer, grad_scale: as numbers, NaN for none, and where given so, as tensors."""
    normalizer = options.normalizer if options.reduction == "mean" else 1.0
    given = (options.label_smoothing, options.z_loss, normalizer, 1.0 if grad_scale is None else grad_scale)
    numbers = [math.nan if x is None or isinstance(x, Tensor) else float(x) for x in given]
    numbers[:2] = [x or math.nan for x in numbers[:2]]  # a factor of 0 is none
    return numbers, [x.detach() if isinstance(x, Tensor) else None for x in given]


def _values(numbers: Sequence[float], tensors: Sequence[Tensor | None], device: torch.device) -> list[Any]:
    """What the kernels take: tensors of the device by pointer; those of the CPU are read, which waits for nothing."""
    return [
        (None if math.isnan(number) else number) if x is None else x if x.device == device else float(x)
        for number, x in zip(numbers, tensors, strict=True)
    ]


def _followed(x: Tensor) -> bool:
    """Whether the kernels can follow the strides of x [..., V]."""
    return x.is_contiguous() or (x.dim() <= 3 and (x.stride(-1) == 1 or x.shape[-1] == 1))


def _row_stride(x: Tensor) -> int | None:
    """Of a followed x; None where its rows are not evenly spaced, as in logits[:, :-1]."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() == 3:
        return x.stride(1) if x.stride(0) == x.shape[1] * x.stride(1) else None
    return x.stride(0) if x.dim() == 2 else 0


def _rows(logits: Tensor, grad: Tensor | None) -> tuple[int | None, tuple[int, ...], int]:
    """Inner size, None where rows are evenly spaced; outer and inner strides of both in units; the unit.

    A power of 2 of elements, it tells the compiler what is aligned without telling it a stride.
    """
    inner, even, grad_even = None, _row_stride(logits), 0 if grad is None else _row_stride(grad)
    strides = (0, even, 0, grad_even)
    if even is None or grad_even is None:
        inner, strides = logits.shape[1], (*logits.stride()[:2], *((0, 0) if grad is None else grad.stride()[:2]))
    unit = math.gcd(16, *strides)
    return inner, tuple(stride // unit for stride in strides), unit


@lru_cache(maxsize=None)
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of second-level cache."""
    if device.type == "cpu":
        return _INTERPRETED
    facts = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return facts.gpu_subslice_count, 0  # torch does not tell the cache: none is counted on
    return facts.multi_processor_count, facts.L2_cache_size


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def _batch(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    softcap: float | None,
    ignore_index: int,
    topk: Sequence[int],
    recorded: Tensor | None,
    losses: Tensor | None,
    loss: Tensor | None,
    kept: Tensor | None,
    grad: Tensor | None,
    sums: Tensor | None,
    counts: Tensor | None,
    ticket: Tensor | None,
) -> None:
    from esper_kernels.cross_entropy import triton_kernels as kernels

    device, rows, classes = logits.device, targets.numel(), logits.shape[-1]
    smoothing, z_loss, normalizer, grad_scale = _values(numbers, tensors, device)
    weight = None if weight is None else weight.detach().contiguous()
    logits, targets = logits if _followed(logits) else logits.contiguous(), targets.contiguous()
    inner, strides, unit = _rows(logits, grad)
    multiprocessors, cache_bytes = _device(device)
    heavy = not (weight is None and smoothing is None and softcap is None)
    sizes = (rows, classes, logits.element_size(), targets.element_size(), heavy)
    chosen = launch.choose(*sizes, multiprocessors=multiprocessors, cache_bytes=cache_bytes)
    columns = len(COUNTS) + len(topk)
    partials, counted = None, None
    with _current(device):
        if loss is not None or counts is not None:
            partials = torch.empty(columns * chosen.programs, dtype=torch.float64, device=device)
            ticket = torch.zeros(1, dtype=torch.int32, device=device) if ticket is None else ticket
        if grad is not None and normalizer is None and chosen.count_first:
            counted = torch.empty(launch.COUNT_PROGRAMS, dtype=torch.float64, device=device)
            kernels.count[(launch.COUNT_PROGRAMS,)](
                targets, weight, counted, rows, V=classes, IGNORE=ignore_index, BLOCK=1024, **_OPTIONS
            )
        kernels.batch[(chosen.programs,)](
            logits,
            targets,
            weight,
            smoothing,
            z_loss,
            softcap,
            normalizer,
            counted,
            recorded,
            grad_scale,
            losses,
            loss,
            kept,
            grad,
            sums,
            counts,
            partials,
            ticket,
            rows,
            inner,
            *strides,
            V=classes,
            UNIT=unit,
            IGNORE=ignore_index,
            TOPK=tuple(topk),
            COLUMNS=columns,
            PADDED=1 << (columns - 1).bit_length(),
            ROWS=chosen.rows,
            BLOCK=chosen.block,
            RESIDENT=chosen.resident,
            STAGES=chosen.stages,
            COUNT_BLOCK=256 * chosen.warps,
            COUNT_PROGRAMS=launch.COUNT_PROGRAMS,
            num_warps=chosen.warps,
            **_OPTIONS,
            **({"maxnreg": chosen.registers} if torch.version.cuda else {}),
        )


def _backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    softcap: float | None,
    ignore_index: int,
    kept: Tensor,
    grad: Tensor,
) -> None:
    from esper_kernels.cross_entropy import triton_kernels as kernels

    device, rows, classes = logits.device, targets.numel(), logits.shape[-1]
    smoothing, z_loss, normalizer, _ = _values(numbers, tensors, device)
    weight = None if weight is None else weight.detach().contiguous()
    logits = logits if _followed(logits) else logits.contiguous()
    inner, strides, unit = _rows(logits, None)
    tile_rows, block, warps = launch.tile(classes)
    if rows == 0:
        return
    with _current(device):
        kernels.backward[(-(-rows // tile_rows), -(-classes // block))](
            grad_output,
            logits,
            targets.contiguous(),
            weight,
            None if weight is None or smoothing is None else weight.sum(dtype=torch.float32),
            smoothing,
            z_loss,
            softcap,
            normalizer,
            kept,
            grad,
            rows,
            inner,
            *strides[:2],
            V=classes,
            UNIT=unit,
            IGNORE=ignore_index,
            PER_ROW=grad_output.dim() > 0,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=warps,
            **_OPTIONS,
        )


_WRITTEN = ("losses", "loss", "kept", "grad", "sums", "counts", "ticket")
_batch_op = torch.library.custom_op("esper::cross_entropy_triton", _batch, mutates_args=_WRITTEN)
_backward_op = torch.library.custom_op("esper::cross_entropy_triton_backward", _backward, mutates_args=("grad",))
for _op in (_batch_op, _backward_op):
    _op.register_fake(lambda *arguments: None)
