"""The memory that the fused backends, `cpp` and `triton`, write their results to."""

import torch
from torch import Tensor

from esper_kernels.meter import Meter

_HUGE = 1 << 20  # elements; for less, the C library usually has memory at hand


def loss_and_saved(
    logits: Tensor, targets: Tensor, reduction: str, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 loss, [] or for "none" [...], and float32 [2 N + 1] for what `backward` needs.

    The latter holds two numbers per row (maximum and sum), then what the sum over rows is divided
    by.
    """
    shape = targets.shape if reduction == "none" else ()
    loss = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if not for_backward:
        return loss, None
    return loss, torch.empty(2 * targets.numel() + 1, dtype=torch.float32, device=logits.device)


def gradient_like(logits: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Memory for the gradient [..., V]."""
    grad = torch.empty_like(logits, memory_format=layout)
    if torch.compiler.is_compiling() or grad.numel() <= _HUGE or not grad.is_cpu:
        return grad
    if hasattr(torch.ops.esper, "use_huge_pages"):  # it is not in a pure Python install
        torch.ops.esper.use_huge_pages.default(grad)
    return grad


def accumulators(
    meter: Meter | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[int, ...], tuple[int, ...]]:
    """A meter's sums, counts, ticket, topk and measures."""
    if meter is None:
        return None, None, None, (), ()
    return meter.sums, meter.counts, meter.ticket, meter.topk, meter.measures or ()
