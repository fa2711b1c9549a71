"""The definition of linear cross entropy, in eager torch on any device: `F.linear`, then the
definition of cross entropy, on the logits of the whole batch.

A backend is a function with the arguments of `run`. It trusts them, because
`esper_kernels.ops.linear_cross_entropy` has checked them, and never waits for the device.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import reference as cross_entropy
from esper_kernels.ops.cross_entropy.reference import Number, Options


class Batch(NamedTuple):
    """hidden, weight and bias have one dtype, which is also that of the logits."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]


class Totals(NamedTuple):
    """Memory for the gradients; None for a gradient that is not wanted. Those of weight and bias
    are float32 (float64 for float64 batches), and are added to."""

    hidden: Tensor | None  # [N, H], written over
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


NO_TOTALS = Totals(None, None, None)


def run(
    batch: Batch,
    options: Options,
    meter: Meter | None,
    scale: Number | None,
    totals: Totals,
    module: Any = cross_entropy,
) -> Tensor:
    """The loss, [] or for reduction "none" [N]; adds the batch to `meter`, and the gradients times
    `scale` to `totals`.

    scale: a number or a tensor [], by default 1; for reduction "none" a tensor [N].
    module: a backend of cross entropy: a module, or `DividedClasses`, with which the total of
        hidden is that of the classes of this rank.
    """
    logits = F.linear(batch.hidden, batch.weight, batch.bias)
    result = module.forward(logits, batch.targets, options, meter)
    loss = result.loss
    if totals == NO_TOTALS:
        return loss
    grad_output = torch.ones_like(loss) if scale is None else torch.ones_like(loss) * scale
    grad = module.backward(grad_output, logits, batch.targets, *result[1:], options)  # [N, V]
    if totals.hidden is not None:
        totals.hidden.copy_(grad @ batch.weight)
    if totals.weight is not None:
        dtype = totals.weight.dtype
        totals.weight.addmm_(grad.to(dtype).t(), batch.hidden.to(dtype))
    if totals.bias is not None:
        totals.bias.add_(grad.sum(0, dtype=totals.bias.dtype))
    return loss
