"""The checks that linear cross entropy adds to those of cross entropy."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import DTYPES
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.vocab_parallel.shard import ClassShard, check_shard


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the logits: that of autocast where it is on, as for `F.linear`."""
    if _in_autocast(hidden) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off, for products of tensors that already have the dtype of the logits."""
    if not torch.amp.is_autocast_available(x.device.type):  # of the meta device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _in_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [..., H], weight [V, H] and bias [V], of one dtype and on one device."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in given.items():
        checks.check_dense(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(
                f"hidden, weight and bias must be on one device, got hidden on {hidden.device}, "
                f"{name} on {x.device}"
            )
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"weight must be [V, H] with V of at least 1, got shape {tuple(weight.shape)}"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        transposed = hidden.dim() > 0 and hidden.shape[-1] == len(weight)
        hint = "; if weight is [H, V], pass weight.t()" if transposed else ""
        raise ValueError(
            f"hidden must be [..., H] with H = {weight.shape[1]}, as weight [V, H] of shape "
            f"{tuple(weight.shape)} has, got shape {tuple(hidden.shape)}{hint}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V] with V = {len(weight)}, as weight has, got {tuple(bias.shape)}"
        )
    dtypes = {str(x.dtype) for x in given.values()}
    if len(dtypes) > 1 and not _in_autocast(hidden):
        raise TypeError(
            "hidden, weight and bias must have one dtype outside of autocast, got "
            + ", ".join(f"{name} {x.dtype}" for name, x in given.items())
        )


def check_storages(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError in a backward pass where one of these was freed since the forward pass."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            checks.check_storage(name, x)


def logits_stand_in(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with the shape, dtype and device of the logits that takes the memory of one
    number."""
    one = torch.empty(1, dtype=dtype, device=hidden.device)
    return one.expand(*hidden.shape[:-1], len(weight))


def check_batch(
    logits: Tensor, targets: Tensor, meter: Meter | None, options: Options, num_classes: int
) -> None:
    """Run the checks of cross entropy. logits: from `logits_stand_in`."""
    checks.check_batch(logits, targets, meter, num_classes)
    checks.check_options(logits, options._asdict(), "class_weight", num_classes)


def check_divided(name: str, shard: ClassShard, weight: Tensor) -> None:
    """Check a shard of the classes, whose weight on this rank is `weight`."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} with a shard is no part of a compiled graph; call it outside of one"
        )
    check_shard(shard, len(weight), "weight")


def check_gradient_memory(name: str, memory: object, parameter: Tensor) -> None:
    """Check that `memory` can take the gradient of a parameter: its shape, and its dtype or
    float32."""
    dtypes = (parameter.dtype, torch.float32)
    if (
        not checks.is_dense(memory)
        or memory.shape != parameter.shape
        or memory.device != parameter.device
        or memory.dtype not in dtypes
        or not memory.is_contiguous()
        or memory.requires_grad
    ):
        raise ValueError(
            f"{name} must be a contiguous tensor of shape {tuple(parameter.shape)} and of "
            f"{' or '.join(sorted({str(dtype) for dtype in dtypes}))} on {parameter.device}, and "
            f"not require grad, got {checks.describe(memory)}"
        )
    checks.check_storage(name, memory)
    checks.refuse_unwritable(name, memory)
