"""Forward and backward of both forms, a few rows at a time, so that nothing of the size of the
logits exists besides them and their gradient. `torch.compile` sees each as an op of its own."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels.ops.cross_entropy.reference import classify, refuse_bad_targets
from esper_kernels.ops.linear_cross_entropy.arguments import without_autocast
from esper_kernels.ops.linear_cross_entropy.chunked import add_gradients, chunks
from esper_kernels.ops.linear_cross_entropy.reference import Batch, Totals
from esper_kernels.ops.token_logprobs import reference

_CPU_BYTES = 1 << 20  # of float32 logits, which stay in the cache then
_GPU_BYTES = 64 << 20


class Inputs(NamedTuple):
    """x: logits [N, V], or with a weight [V, H], and a bias [V] or None, hidden [N, H].

    dtype: of the logits. Rows with target ignore_index give 0.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor  # [N]
    dtype: torch.dtype
    temperature: float
    ignore_index: int


@torch.no_grad()
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    temperature: float,
    ignore_index: int,
    logprobs: Tensor,  # [N]
    entropy: Tensor | None,  # [N]
) -> None:
    inputs = Inputs(x, weight, bias, targets, dtype, temperature, ignore_index)
    rows = classify(targets, _classes(inputs), ignore_index)
    refuse_bad_targets(targets, _classes(inputs), ignore_index)
    for chunk, logits in _chunks(inputs, _batch(inputs)):
        for part, place in _parts(chunk, logits):
            found = reference.forward(
                logits[part], rows.target[place], temperature, entropy is not None
            )
            for out, values in zip((logprobs, entropy), found, strict=True):
                if out is not None and values is not None:
                    values = torch.where(rows.ignored[place], 0.0, values)
                    out[place] = torch.where(rows.bad[place], torch.nan, values)


@torch.no_grad()
def _backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    temperature: float,
    ignore_index: int,
    grad_logprobs: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    grad_x: Tensor | None,  # written over
    grad_weight: Tensor | None,  # float32, added to, and so is that of the bias
    grad_bias: Tensor | None,
) -> None:
    inputs = Inputs(x, weight, bias, targets, dtype, temperature, ignore_index)
    batch = _batch(inputs)
    rows = classify(targets, _classes(inputs), ignore_index)
    for chunk, logits in _chunks(inputs, batch):
        grad = logits  # in place on what was computed for this chunk
        if batch is None:
            assert grad_x is not None
            grad = grad_x
        for part, place in _parts(chunk, logits):
            grad[part] = reference.backward(
                logits[part],
                rows.target[place],
                temperature,
                grad_logprobs[place],
                None if grad_entropy is None else grad_entropy[place],
            ).masked_fill_(~rows.valid[place, None], 0.0)
        if batch is not None:
            add_gradients(grad, batch, chunk, Totals(grad_x, grad_weight, grad_bias))


def _classes(inputs: Inputs) -> int:
    return inputs.x.shape[-1] if inputs.weight is None else len(inputs.weight)


def _batch(inputs: Inputs) -> Batch | None:
    if inputs.weight is None:
        return None
    dtype = inputs.dtype
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    return Batch(inputs.x.to(dtype), inputs.weight.to(dtype), bias, inputs.targets)


def _chunks(inputs: Inputs, batch: Batch | None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and their logits: of those that were given, all at once."""
    if batch is None:
        yield slice(0, len(inputs.x)), inputs.x
        return
    with without_autocast(inputs.x):
        yield from chunks(batch, copies=1)


def _parts(chunk: slice, logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """A few rows at a time: their places in the chunk and in the batch."""
    most = _CPU_BYTES if logits.is_cpu else _GPU_BYTES
    size = max(1, most // (4 * logits.shape[-1]))
    for start in range(0, len(logits), size):
        stop = min(start + size, len(logits))
        yield slice(start, stop), slice(chunk.start + start, chunk.start + stop)


_forward_op = torch.library.custom_op(
    "esper::token_logprobs", _forward, mutates_args=("logprobs", "entropy")
)
_backward_op = torch.library.custom_op(
    "esper::token_logprobs_backward",
    _backward,
    mutates_args=("grad_x", "grad_weight", "grad_bias"),
)
_forward_op.register_fake(lambda *arguments: None)
_backward_op.register_fake(lambda *arguments: None)


def forward(inputs: Inputs, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and, if wanted, entropies [N]; IndexError for bad targets on the CPU."""
    logprobs = inputs.x.new_empty(len(inputs.x), dtype=_sum_dtype(inputs.dtype))
    entropies = torch.empty_like(logprobs) if entropy else None
    call = _forward_op if torch.compiler.is_compiling() else _forward
    call(*inputs, logprobs, entropies)
    return logprobs, entropies


def backward(
    inputs: Inputs,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wanted: tuple[bool, ...],  # of x, weight and bias
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias; None for those that are not wanted."""
    x, weight, bias = inputs[:3]
    total = _sum_dtype(inputs.dtype)
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None,
        torch.zeros_like(weight, dtype=total) if wanted[1] and weight is not None else None,
        torch.zeros_like(bias, dtype=total) if wanted[2] and bias is not None else None,
    )
    call = _backward_op if torch.compiler.is_compiling() else _backward
    call(*inputs, grad_logprobs, grad_entropy, *grads)
    return tuple(
        None if grad is None or like is None else grad.to(like.dtype)
        for grad, like in zip(grads, (x, weight, bias), strict=True)
    )


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
