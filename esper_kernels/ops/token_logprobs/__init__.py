"""Log-probabilities of targets and entropies, from logits or from hidden states and a head: what
policy-gradient training of language models computes for every batch.

In eager torch on every device, a few rows at a time; there are no kernels of its own yet.
"""

from typing import Any

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.ops.derivatives import DifferentiableOnce
from esper_kernels.ops.linear_cross_entropy import arguments
from esper_kernels.ops.token_logprobs import op
from esper_kernels.ops.token_logprobs.op import Inputs

_INSTEAD = "torch.log_softmax"  # where derivatives or traces are refused
_NUMBERS = 4  # arguments of the autograd function after the tensors: they get no gradient


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_softmax(logits / temperature)` at the targets, and the entropy of each row in nats.

    logits: [..., V] float32, bfloat16, float16 (arithmetic in float32) or float64.
    targets: [...] int64, int32 or uint8 in [0, V), or ignore_index: such a row gives 0 and gets a
        zero gradient. Others raise IndexError on the CPU; elsewhere their row gives NaN.
    temperature: above 0.

    Returns the log-probabilities [...], with `entropy` also the entropies [...], float32 (float64
    for float64 logits); both are differentiable once. Keeps the logits for the backward pass, no
    copy. Raises as `cross_entropy` does.
    """
    checks.refuse_transforms("token_logprobs", logits, _INSTEAD)
    checks.check_batch(logits, targets, None)
    _check_numbers(temperature, ignore_index)
    inputs = Inputs(
        logits.reshape(targets.numel(), logits.shape[-1]),
        None,
        None,
        targets.reshape(-1),
        logits.dtype,
        float(temperature),
        ignore_index,
    )
    return _shaped(_TokenLogprobs.apply(entropy, "token_logprobs", *inputs), targets)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs(F.linear(hidden, weight, bias), targets)` without the logits of the batch:
    they are computed in chunks of rows, and again in the backward pass.

    hidden [..., H], weight [V, H] and bias [V] as for `linear_cross_entropy`; the rest, and what is
    returned, as for `token_logprobs`.
    """
    for x in (hidden, weight, bias):
        checks.refuse_transforms("linear_token_logprobs", x, _INSTEAD)
    arguments.check_linear(hidden, weight, bias)
    dtype = arguments.compute_dtype(hidden)
    checks.check_batch(arguments.logits_stand_in(hidden, weight, dtype), targets, None)
    _check_numbers(temperature, ignore_index)
    inputs = Inputs(
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        dtype,
        float(temperature),
        ignore_index,
    )
    return _shaped(_TokenLogprobs.apply(entropy, "linear_token_logprobs", *inputs), targets)


def _check_numbers(temperature: object, ignore_index: object) -> None:
    if not isinstance(temperature, (int, float)) or not 0 < temperature < torch.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def _shaped(
    results: tuple[Tensor, Tensor | None], targets: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    logprobs, entropy = results
    if entropy is None:
        return logprobs.view(targets.shape)
    return logprobs.view(targets.shape), entropy.view(targets.shape)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        entropy: bool,
        name: str,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.name = name
        ctx.numbers = numbers
        ctx.save_for_backward(x, weight, bias, targets)
        return op.forward(Inputs(x, weight, bias, targets, *numbers), entropy)

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        checks.refuse_transforms(f"the gradient of {ctx.name}", grad_logprobs, _INSTEAD)
        inputs = Inputs(*ctx.saved_tensors, *ctx.numbers)
        checks.check_storage("logits" if inputs.weight is None else "hidden", inputs.x)
        with torch.no_grad():
            grads = op.backward(inputs, grad_logprobs, grad_entropy, ctx.needs_input_grad[2:5])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            depends_on = [x for x in (*inputs[:3], grad_logprobs) if x is not None]
            grads = tuple(
                None if grad is None else DifferentiableOnce.apply(ctx.name, grad, *depends_on)
                for grad in grads
            )
        return None, None, *grads, *(None,) * _NUMBERS
