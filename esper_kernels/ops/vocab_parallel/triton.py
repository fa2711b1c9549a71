"""One rank's part of the cross entropy of divided classes, by the Triton kernels of
`triton_kernels`: one program per row."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.memory import gradient_like
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.vocab_parallel.reference import num_sums
from esper_kernels.ops.vocab_parallel.shard import ClassShard
from esper_kernels.values import materialized, plain_rows

_BLOCK = 2048  # classes that a program reads at a time
_PER_WARP = 128  # of them


def class_sums(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    target_logit: Tensor | None,
    plan: MeasurePlan | None,
    shard: ClassShard,
) -> Tensor:
    from esper_kernels.ops.vocab_parallel import triton_kernels as kernels

    rows = targets.numel()
    sums = logits.new_empty(num_sums(plan), *targets.shape, dtype=torch.float64)
    _launch(
        kernels.class_sums_of_rows,
        logits,
        targets,
        options,
        shard,
        (target_logit, options.second, options.weight, sums),
        (rows,),
        SMOOTHED=reference.is_on(options.label_smoothing),
        MEASURED=plan is not None,
        ENTROPY=bool(plan and plan.entropy),
    )
    return sums


def backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    denominator: Tensor,
    options: Options,
    shard: ClassShard,
    out: Tensor | None,
) -> Tensor:
    from esper_kernels.ops.vocab_parallel import triton_kernels as kernels

    rows = reference.classify(targets, shard.num_classes, options.ignore_index)
    factors = reference.row_factors(
        grad_output, rows, row_max, row_log_sum, denominator, options, shard.num_classes
    )
    of_rows = (row_max, row_log_sum, *factors)
    # A batch whose denominator is 0 has a gradient of 0, even in rows that are not finite.
    counted = torch.where(denominator != 0, targets.long(), options.ignore_index)
    written = gradient_like(logits) if out is None or not out.is_contiguous() else out
    _launch(
        kernels.gradients_of_rows,
        logits,
        counted,
        options,
        shard,
        (
            *(x if x is None else x.expand(targets.shape) for x in of_rows),
            options.second,
            options.weight,
            written,
        ),
        (),
    )
    return written if out is None or written is out else out.copy_(written)


def _launch(
    kernel: Any,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    shard: ClassShard,
    tensors: tuple[Tensor | None, ...],  # those that are written, contiguous
    sizes: tuple[int, ...],
    **constants: bool,
) -> None:
    rows = targets.numel()
    classes = logits.shape[-1]
    if rows == 0:
        return
    logits, *strides = plain_rows(materialized(logits))
    block = min(_BLOCK, max(16, 1 << (classes - 1).bit_length()))
    on_cpu = logits.device.type == "cpu"  # in the interpreter
    device = nullcontext() if on_cpu else torch.accelerator.device_index(logits.device.index)
    with device:  # Triton launches on the current one
        kernel[(rows,)](
            logits,
            materialized(targets).contiguous(),
            *(x if x is None else materialized(x).contiguous() for x in tensors),
            options.softcap,
            *sizes,
            *strides,
            shard.first,
            shard.num_classes,
            V=classes,
            IGNORE=options.ignore_index,
            BLOCK=block,
            num_warps=max(1, block // _PER_WARP),
            # Triton's own default, which it warns will change
            enable_fp_fusion=True,
            **constants,
        )
