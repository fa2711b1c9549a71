"""Cross entropy of logits whose classes are divided among the ranks of a process group, as tensor
parallelism leaves them: no rank ever holds all logits of a row.

`vocab_parallel_cross_entropy` is differentiable, and `vocab_parallel_cross_entropy_step` gives the
gradient of the logits alone. `divided` has what the ranks do together; `reference`, `cpp` and
`triton` have what each does by itself. For logits that never exist as a whole,
`linear_cross_entropy` takes a `shard`.
"""

from typing import Any

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy.arguments import (
    destination,
    mixture,
    refuse_per_row,
)
from esper_kernels.ops.cross_entropy.reference import Forward, Options, refuse_bad_targets
from esper_kernels.ops.derivatives import DifferentiableOnce
from esper_kernels.ops.vocab_parallel.divided import DividedClasses
from esper_kernels.ops.vocab_parallel.shard import ClassShard, all_classes, check_shard

__all__ = ["ClassShard", "vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy_step"]
_OP = "vocab_parallel_cross_entropy"


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    shard: ClassShard,
    *,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    meter: Meter | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """`cross_entropy` of the logits of all ranks, on every rank.

    logits: [..., V of this rank]. For a DTensor pass `logits.to_local()`.
    targets: [...], the same on every rank, in [0, shard.num_classes) or ignore_index.
    shard: which classes these are, as `ClassShard.across(V of this rank)` finds them, or
        `ClassShard.of(logits)` for a DTensor.
    weight: [shard.num_classes], the weights of all classes, on every rank.
    meter: receives the whole batch on every rank, so do not add the meters of these ranks up.

    The other options, MixUp's too, are those of `cross_entropy`.
    All ranks of `shard.group` must call it, with the same options and with meters alike: it is one
    collective, and with a meter two. The backward pass needs none: each rank gets the gradient of
    its own logits, from a `grad_output` that must be the same on every rank. A compiled graph
    breaks here.

    Returns the same loss on every rank, as `cross_entropy` does. Raises as it does, before any
    communication, for what a rank can see by itself.
    """
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        getattr(config, "instruction_set", "auto"),  # of None too
    )
    backend = _check(_OP, logits, targets, shard, meter, options, config)
    if targets2 is not None or share is not None:
        targets, options = mixture(logits, targets, targets2, share, options, shard.num_classes)
    divided = DividedClasses.served_by(backend, shard)
    if logits.requires_grad and torch.is_grad_enabled():
        loss: Tensor = _VocabParallel.apply(logits, targets, meter, divided, *options)
        return loss
    return divided.forward(logits, targets, options, meter).loss


def vocab_parallel_cross_entropy_step(
    logits: Tensor,
    targets: Tensor,
    meter: Meter | None,
    shard: ClassShard,
    *,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    inplace: bool = False,
    config: KernelConfig | None = None,
) -> Tensor:
    """The gradient of `vocab_parallel_cross_entropy` for the logits of this rank, without a loss
    tensor or autograd node.

    Arguments as there, and grad_scale, out and inplace as for `cross_entropy_step`.

    Returns the gradient [..., V of this rank] in the logits' dtype.
    """
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        getattr(config, "instruction_set", "auto"),  # of None too
    )
    refuse_per_row(options.reduction)
    backend = _check(f"{_OP}_step", logits, targets, shard, meter, options, config)
    checks.check_number("grad_scale", grad_scale, logits, low=-torch.inf)
    written = destination(logits, out, inplace)
    if inplace:
        checks.check_writable("logits with inplace=True", logits)
    elif out is not None:
        checks.check_out(out, logits)
    if targets2 is not None or share is not None:
        targets, options = mixture(logits, targets, targets2, share, options, shard.num_classes)
    if written is not None:
        read = {**options._asdict(), "targets": targets, "grad_scale": grad_scale}
        checks.check_apart(written, read)
    divided = DividedClasses.served_by(backend, shard)
    grad = divided.step(logits.detach(), targets, options, meter, grad_scale, written)
    if written is not None:
        torch.autograd.graph.increment_version(written)
    return grad


def _check(
    name: str,
    logits: Tensor,
    targets: Tensor,
    shard: ClassShard,
    meter: Meter | None,
    options: Options,
    config: KernelConfig | None,
) -> str:
    """The backend. Raise for what one rank can see; the other ranks then wait for it until their
    timeout."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{name} is no part of a compiled graph; call it outside of one")
    checks.refuse_transforms(name, logits)
    backend = checks.choose_backend(_OP, logits, config, "logits")
    checks.check_batch(logits, targets, meter, all_classes(shard))
    check_shard(shard, logits.shape[-1], "logits")
    checks.check_options(logits, options._asdict(), num_classes=shard.num_classes)
    refuse_bad_targets(targets, shard.num_classes, options.ignore_index)
    return backend


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        meter: Meter | None,
        divided: DividedClasses,
        *options: Any,
    ) -> Tensor:
        result = divided.forward(logits, targets, Options(*options), meter)
        ctx.divided = divided
        ctx.options = options
        # Tensors go through save_for_backward, which notices a later change of their values.
        ctx.places = [i for i, x in enumerate(options) if isinstance(x, Tensor)]
        ctx.save_for_backward(logits, targets, *result, *(options[i] for i in ctx.places))
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_transforms(f"the gradient of {_OP}", grad_output)
        logits, targets, *tensors = ctx.saved_tensors
        checks.check_storage("logits", logits)
        result = Forward(*tensors[:4])
        options = list(ctx.options)
        for place, value in zip(ctx.places, tensors[4:], strict=True):
            options[place] = value
        with torch.no_grad():
            grad = ctx.divided.backward(
                grad_output, logits, targets, *result[1:], Options(*options)
            )
        if torch.is_grad_enabled():  # create_graph=True
            grad = DifferentiableOnce.apply(_OP, grad, logits, grad_output)
        return grad, *(None,) * (3 + len(options))
