"""Forward and backward of both forms: one call of the backend for logits that are given, and one
per chunk of rows for those of a linear layer, so that the logits of the batch never exist.
`torch.compile` sees each as an op of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels.ops.cross_entropy.memory import gradient_like
from esper_kernels.ops.cross_entropy.reference import refuse_bad_targets
from esper_kernels.ops.linear_cross_entropy.arguments import without_autocast
from esper_kernels.ops.linear_cross_entropy.chunked import add_gradients, chunks
from esper_kernels.ops.linear_cross_entropy.reference import Batch, Totals
from esper_kernels.ops.token_logprobs import cpp, reference, triton
from esper_kernels.ops.token_logprobs.reference import Options

_MODULES = {"eager": reference, "cpp": cpp, "triton": triton, "cuda": cpp}


class Inputs(NamedTuple):
    """x: logits [..., V] or, with a weight [V, H] and a bias [V] or None, hidden [N, H].

    dtype: of the logits. The last three are the fields of `reference.Options`.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor  # [...] or [N]
    backend: str
    dtype: torch.dtype
    temperature: float
    ignore_index: int
    instruction_set: str


class Results(NamedTuple):
    """Float32, float64 for float64 logits; None for what is not wanted."""

    logprobs: Tensor  # [N]
    entropy: Tensor | None  # [N]
    row_sums: Tensor | None  # [N, 2], for the backward pass


@torch.no_grad()
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    backend: str,
    dtype: torch.dtype,
    temperature: float,
    ignore_index: int,
    instruction_set: str,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    module = _MODULES[backend]
    options = Options(temperature, ignore_index, instruction_set)
    if weight is None:
        refuse_bad_targets(targets, x.shape[-1], ignore_index)
        module.forward(x, targets, options, logprobs, entropy, row_sums)
        return
    refuse_bad_targets(targets, len(weight), ignore_index)
    with without_autocast(x):
        for rows, logits in chunks(_batch(x, weight, bias, targets, dtype), copies=1):
            module.forward(
                logits,
                targets[rows],
                options,
                logprobs[rows],
                None if entropy is None else entropy[rows],
                None if row_sums is None else row_sums[rows],
            )


@torch.no_grad()
def _backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    backend: str,
    dtype: torch.dtype,
    temperature: float,
    ignore_index: int,
    instruction_set: str,
    entropy: Tensor | None,
    row_sums: Tensor,
    grad_logprobs: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    grad_x: Tensor | None,  # written over
    grad_weight: Tensor | None,  # float32, added to, and so is that of the bias
    grad_bias: Tensor | None,
) -> None:
    module = _MODULES[backend]
    options = Options(temperature, ignore_index, instruction_set)
    if weight is None:
        assert grad_x is not None
        sums = (entropy, row_sums)
        module.backward(x, targets, options, *sums, grad_logprobs, grad_entropy, grad_x)
        return
    batch = _batch(x, weight, bias, targets, dtype)
    totals = Totals(grad_x, grad_weight, grad_bias)
    with without_autocast(x):
        for rows, logits in chunks(batch, copies=1):
            module.backward(
                logits,
                targets[rows],
                options,
                None if entropy is None else entropy[rows],
                row_sums[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                logits,  # in place on what was computed for this chunk
            )
            add_gradients(logits, batch, rows, totals)


def _batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Batch:
    return Batch(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets)


_forward_op = torch.library.custom_op(
    "esper::token_logprobs_call", _forward, mutates_args=("logprobs", "entropy", "row_sums")
)
_backward_op = torch.library.custom_op(
    "esper::token_logprobs_backward_call",
    _backward,
    mutates_args=("grad_x", "grad_weight", "grad_bias"),
)
_forward_op.register_fake(lambda *arguments: None)
_backward_op.register_fake(lambda *arguments: None)


def forward(inputs: Inputs, entropy: bool, for_backward: bool) -> Results:
    """IndexError for bad targets on the CPU."""
    logprobs = inputs.x.new_empty(inputs.targets.numel(), dtype=_sum_dtype(inputs.dtype))
    results = Results(
        logprobs,
        torch.empty_like(logprobs) if entropy else None,
        logprobs.new_empty(logprobs.shape[0], 2) if for_backward else None,
    )
    call = _forward_op if torch.compiler.is_compiling() else _forward
    call(*inputs, *results)
    return results


def backward(
    inputs: Inputs,
    entropy: Tensor | None,
    row_sums: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wanted: tuple[bool, ...],  # of x, weight and bias
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias; None for those that are not wanted."""
    x, weight, bias = inputs[:3]
    total = _sum_dtype(inputs.dtype)
    grads = (
        gradient_like(x) if wanted[0] else None,
        torch.zeros_like(weight, dtype=total) if wanted[1] and weight is not None else None,
        torch.zeros_like(bias, dtype=total) if wanted[2] and bias is not None else None,
    )
    call = _backward_op if torch.compiler.is_compiling() else _backward
    call(*inputs, entropy, row_sums, grad_logprobs, grad_entropy, *grads)
    return tuple(
        None if grad is None or like is None else grad.to(like.dtype)
        for grad, like in zip(grads, (x, weight, bias), strict=True)
    )


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
