"""Log-probabilities of targets by the Triton kernels of `triton_kernels`: one program per row."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from esper_kernels.ops.token_logprobs.reference import Options
from esper_kernels.values import are_fake, materialized, plain_rows

_BLOCK = 2048  # classes that a program reads at a time
_PER_WARP = 256  # of them


def forward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    if are_fake((logits, targets)):
        return
    from esper_kernels.ops.token_logprobs import triton_kernels as kernels

    outputs = (logprobs, entropy, row_sums)
    _launch(kernels.logprobs_of_rows, logits, targets, options, outputs, ())


def backward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    entropy: Tensor | None,
    row_sums: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    if are_fake((logits, targets, grad_logprobs)):
        return
    from esper_kernels.ops.token_logprobs import triton_kernels as kernels

    grads = [
        None if x is None else materialized(x).contiguous() for x in (grad_logprobs, grad_entropy)
    ]
    _launch(
        kernels.gradients_of_rows, logits, targets, options, (entropy, row_sums, *grads), (out,)
    )


def _launch(
    kernel: Any,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    of_rows: tuple[Tensor | None, ...],
    out: tuple[Tensor, ...],  # contiguous, like the logits
) -> None:
    rows = targets.numel()
    classes = logits.shape[-1]
    if rows == 0:
        return
    logits, inner, outer_stride, inner_stride = plain_rows(materialized(logits))
    block = min(_BLOCK, max(16, 1 << (classes - 1).bit_length()))
    on_cpu = logits.device.type == "cpu"  # in the interpreter
    device = nullcontext() if on_cpu else torch.accelerator.device_index(logits.device.index)
    with device:  # Triton launches on the current one
        kernel[(rows,)](
            logits,
            materialized(targets).contiguous(),
            *of_rows,
            *out,
            1.0 / options.temperature,
            inner,
            outer_stride,
            inner_stride,
            V=classes,
            IGNORE=options.ignore_index,
            BLOCK=block,
            num_warps=max(1, block // _PER_WARP),
            # Triton's own default, which it warns will change
            enable_fp_fusion=True,
        )
