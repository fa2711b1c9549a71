"""The refusal of second derivatives, which the autograd functions of all ops share."""

from typing import Any

import torch
from torch import Tensor


class DifferentiableOnce(torch.autograd.Function):
    """Ties the gradient to what it depends on, so that a second derivative raises instead of being
    left out.

    torch's own `once_differentiable` does this only where grad_output requires grad.
    """

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.op} is differentiable once; for second derivatives use torch's own op"
        )
