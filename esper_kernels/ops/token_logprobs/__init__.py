"""Log-probabilities of targets and entropies, from logits or from hidden states and a head: what
policy-gradient training of language models computes for every batch.

`token_logprobs` reads the logits once, and once more for their gradient; `linear_token_logprobs`
calls the same kernels for each chunk of rows. `reference` is the definition.
"""

from typing import Any

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import KernelConfig, instruction_set_of
from esper_kernels.ops.derivatives import DifferentiableOnce
from esper_kernels.ops.linear_cross_entropy import arguments
from esper_kernels.ops.token_logprobs import op
from esper_kernels.ops.token_logprobs.op import Inputs

_INSTEAD = "torch.log_softmax"  # where derivatives or traces are refused


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    config: KernelConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_softmax(logits / temperature)` at the targets, and the entropy of each row in nats.

    logits: [..., V] float32, bfloat16, float16 (arithmetic in float32) or float64 (in float64, for
        checks). Those of -inf have probability 0; a row with NaN or inf, or of -inf alone, gives
        NaN.
    targets: [...] int64, int32 or uint8 in [0, V), or ignore_index. A row whose target is
        ignore_index gives 0 and gets a zero gradient. Other targets raise IndexError on the CPU;
        elsewhere their row gives NaN and gets a zero gradient.
    temperature: in [2**-100, 2**100].
    entropy: True also returns the entropies.
    config: a `KernelConfig`; None chooses.

    Returns the log-probabilities [...], with `entropy` also the entropies [...], float32 (float64
    for float64 logits); both are differentiable once. Keeps the logits and three numbers per row
    for the backward pass. Raises as `cross_entropy` does.
    """
    checks.refuse_transforms("token_logprobs", logits, _INSTEAD)
    checks.check_batch(logits, targets, None)
    _check_numbers(temperature, ignore_index, entropy)
    inputs = Inputs(
        logits,
        None,
        None,
        targets,
        checks.choose_backend("token_logprobs", logits, config, "logits"),
        logits.dtype,
        float(temperature),
        ignore_index,
        instruction_set_of(config),
    )
    return _call("token_logprobs", inputs, entropy, targets.shape)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    config: KernelConfig | None = None,
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
    logits = arguments.logits_stand_in(hidden, weight, dtype)
    checks.check_batch(logits, targets, None)
    _check_numbers(temperature, ignore_index, entropy)
    inputs = Inputs(
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        checks.choose_backend("token_logprobs", logits, config, "hidden"),
        dtype,
        float(temperature),
        ignore_index,
        instruction_set_of(config),
    )
    return _call("linear_token_logprobs", inputs, entropy, targets.shape)


def _check_numbers(temperature: object, ignore_index: object, entropy: object) -> None:
    # In float32, logit / temperature leaves the normal numbers outside of this range.
    checks.check_divisor("temperature", temperature)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_flag("entropy", entropy)


def _call(
    name: str, inputs: Inputs, entropy: bool, shape: torch.Size
) -> Tensor | tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:3]):
        logprobs, entropies = _TokenLogprobs.apply(entropy, name, *inputs)
    else:
        logprobs, entropies, _ = op.forward(inputs, entropy, for_backward=False)
    if entropies is None:
        return logprobs.view(shape)
    return logprobs.view(shape), entropies.view(shape)


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
        *settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = Inputs(x, weight, bias, targets, *settings)
        logprobs, entropies, row_sums = op.forward(inputs, entropy, for_backward=True)
        ctx.name = name
        ctx.settings = settings
        ctx.save_for_backward(x, weight, bias, targets, entropies, row_sums)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        checks.refuse_transforms(f"the gradient of {ctx.name}", grad_logprobs, _INSTEAD)
        *tensors, entropies, row_sums = ctx.saved_tensors
        inputs = Inputs(*tensors, *ctx.settings)
        if inputs.weight is None:
            checks.check_storage("logits", inputs.x)
        else:
            arguments.check_storages(inputs.x, inputs.weight, inputs.bias)
        with torch.no_grad():
            grads = op.backward(
                inputs,
                entropies,
                row_sums,
                grad_logprobs,
                grad_entropy,
                ctx.needs_input_grad[2:5],
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            given = (*inputs[:3], grad_logprobs, grad_entropy)
            depends_on = [x for x in given if x is not None]
            grads = tuple(
                None if grad is None else DifferentiableOnce.apply(ctx.name, grad, *depends_on)
                for grad in grads
            )
        return None, None, *grads, *(None,) * (len(Inputs._fields) - 3)
