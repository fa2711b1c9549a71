"""Linear cross entropy: the loss of `hidden @ weight.T + bias`, without the logits of the batch.

`linear_cross_entropy` is differentiable; `linear_cross_entropy_step` returns or adds up gradients
without an autograd node. `reference` is the definition, `chunked` serves the fused backends, and
divided classes (`shard`) on every backend. The options, what is refused and how rows are counted
are those of `esper_kernels.cross_entropy`.

Long functions: each public function hands on every option by name.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import KernelConfig, instruction_set_of
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy.arguments import as_tensor, mixture, traceable
from esper_kernels.ops.cross_entropy.reference import Options, refuse_bad_targets
from esper_kernels.ops.derivatives import DifferentiableOnce
from esper_kernels.ops.linear_cross_entropy import arguments, op
from esper_kernels.ops.linear_cross_entropy.reference import NO_TOTALS, Batch, Totals
from esper_kernels.ops.vocab_parallel.shard import ClassShard

_INSTEAD = "F.linear and F.cross_entropy"  # where derivatives or traces are refused


class LinearGradients(NamedTuple):
    """The gradients that `linear_cross_entropy_step` returns; None for an argument that needs
    none."""

    hidden: Tensor | None  # as hidden
    weight: Tensor | None  # as weight, or the `weight_grad` that was given
    bias: Tensor | None  # as bias, or the `bias_grad` that was given


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shard: ClassShard | None = None,
    meter: Meter | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """`cross_entropy(F.linear(hidden, weight, bias), targets)` without the logits of the batch,
    with its metrics added to `meter`.

    hidden: [..., H] float32, bfloat16, float16, or float64 (for checks, with all logits at once).
    weight: [V, H], and bias: [V], of that dtype; under autocast each may have its own.
    targets: [...]. The options, MixUp's too, are those of `cross_entropy`, whose `weight` is
        class_weight here.
    shard: which classes weight and bias hold, where ranks divide them, as
        `ClassShard.across(len(weight))` finds it. All ranks of `shard.group` must then call this
        with the same hidden, targets and options, and want gradients of the same arguments;
        class_weight is [shard.num_classes]. Every rank gets the loss over all classes, and the
        gradient of hidden summed over the ranks, so do not add that up again; those of weight and
        bias are of its own classes. meter receives the whole batch on every rank. A compiled graph
        breaks here.

    The backward pass of "mean" and "sum" only multiplies: the gradients of what requires grad are
    computed with the loss, because the logits would have to be computed again later. In float16,
    whose small gradients a loss scaler has to reach before they are rounded, and for "none", the
    backward pass does compute them again.

    Returns the loss, [] or for "none" [...], float32 (float64 for float64), differentiable once.
    Raises as `cross_entropy` does, before anything is written.
    """
    options = Options(
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set_of(config),
    )
    backend, batch, dtype, options = _prepare(
        "linear_cross_entropy",
        hidden,
        weight,
        bias,
        targets,
        targets2,
        share,
        meter,
        options,
        shard,
        config,
    )
    options = traceable(options, hidden)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in batch[:3]):
        loss: Tensor = _LinearCrossEntropy.apply(*batch, meter, backend, dtype, shard, *options)
    else:
        loss = op.run(backend, batch, dtype, options, meter, None, NO_TOTALS, shard)
    return loss.view(hidden.shape[:-1]) if reduction == "none" else loss


def linear_cross_entropy_step(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    meter: Meter | None = None,
    *,
    bias: Tensor | None = None,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    shard: ClassShard | None = None,
    config: KernelConfig | None = None,
) -> LinearGradients:
    """The gradients of `linear_cross_entropy`, without a loss tensor or autograd node.

    Arguments as for `linear_cross_entropy`, with reduction "mean" or "sum", and grad_scale: a
    number or a 0-d tensor (a loss scaler's), multiplied in before gradients are rounded.

    weight_grad, bias_grad: contiguous memory of the shape of weight and bias, such as their
        `.grad`, of their dtype or float32. The gradient is added to it, and it is returned.

    Returns a gradient for each of hidden, weight and bias that requires grad or has memory given:
    `hidden.backward(gradients.hidden)` goes on from there. Sums over rows are float32, and are
    rounded once, to the dtype of the argument or of the memory given.
    """
    options = Options(
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set_of(config),
    )
    checks.check_reduction(reduction)
    if reduction == "none":
        raise ValueError(
            "linear_cross_entropy_step takes reduction 'mean' or 'sum'; for 'none' use "
            "linear_cross_entropy"
        )
    backend, batch, dtype, options = _prepare(
        "linear_cross_entropy_step",
        hidden,
        weight,
        bias,
        targets,
        targets2,
        share,
        meter,
        options,
        shard,
        config,
    )
    checks.check_number("grad_scale", grad_scale, hidden, low=-torch.inf)
    read: dict[str, object] = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}
    read |= {"class_weight": class_weight, "normalizer": normalizer, "grad_scale": grad_scale}
    read |= {"label_smoothing": label_smoothing, "z_loss": z_loss}
    for name, memory, parameter in (
        ("weight_grad", weight_grad, weight),
        ("bias_grad", bias_grad, bias),
    ):
        if memory is not None:
            if parameter is None:
                raise ValueError(f"expected no {name} without bias, got one; pass bias too")
            arguments.check_gradient_memory(name, memory, parameter)
            checks.check_apart(memory, read)
            read[name] = memory

    totals = Totals(
        torch.empty_like(batch.hidden) if hidden.requires_grad else None,
        _memory_for(weight, weight_grad),
        _memory_for(bias, bias_grad),
    )
    scale = as_tensor(grad_scale, hidden) if torch.compiler.is_compiling() else grad_scale
    op.run(backend, batch, dtype, traceable(options, hidden), meter, scale, totals, shard)
    grad_hidden = None if totals.hidden is None else totals.hidden.view(hidden.shape)
    return LinearGradients(grad_hidden, totals.weight, totals.bias)


def _prepare(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    targets2: Tensor | None,
    share: float | Tensor | None,
    meter: Meter | None,
    options: Options,
    shard: ClassShard | None,
    config: KernelConfig | None,
) -> tuple[str, Batch, torch.dtype, Options]:
    """Check everything but the values of the targets; the backend, the batch with one leading
    dimension, the dtype of its logits, and the options."""
    for x in (hidden, weight, bias):
        checks.refuse_transforms(name, x, _INSTEAD)
    arguments.check_linear(hidden, weight, bias)
    num_classes = len(weight)
    if shard is not None:
        arguments.check_divided(name, shard, weight)
        num_classes = shard.num_classes
    dtype = arguments.compute_dtype(hidden)
    logits = arguments.logits_stand_in(hidden, weight, dtype)
    arguments.check_batch(logits, targets, meter, options, num_classes)
    served_as = "linear_cross_entropy" if shard is None else "vocab_parallel_cross_entropy"
    backend = checks.choose_backend(served_as, logits, config, "hidden")
    if targets2 is not None or share is not None:
        refuse_bad_targets(targets, num_classes, options.ignore_index)
        targets, options = mixture(logits, targets, targets2, share, options, num_classes)
        assert options.second is not None
        assert options.shares is not None
        options = options._replace(
            second=options.second.flatten(), shares=options.shares.flatten(1)
        )
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    return backend, Batch(rows, weight, bias, targets.reshape(-1)), dtype, options


def _memory_for(parameter: Tensor | None, given: Tensor | None) -> Tensor | None:
    if given is not None or parameter is None or not parameter.requires_grad:
        return given
    return torch.zeros_like(parameter, memory_format=torch.contiguous_format, requires_grad=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        meter: Meter | None,
        backend: str,
        dtype: torch.dtype,
        shard: ClassShard | None,
        *options: Any,
    ) -> Tensor:
        batch = Batch(hidden, weight, bias, targets)
        ctx.call = (backend, dtype)
        ctx.shard = shard
        ctx.computes_later = dtype == torch.float16 or Options(*options).reduction == "none"
        totals = NO_TOTALS
        if not ctx.computes_later:
            sums = torch.promote_types(dtype, torch.float32)
            totals = _new_totals(batch, ctx.needs_input_grad[:3], sums)
        loss = op.run(backend, batch, dtype, Options(*options), meter, None, totals, shard)
        # Tensors go through save_for_backward, which notices a later change of their values.
        ctx.options = [None if isinstance(x, Tensor) else x for x in options]
        tensors = [x if isinstance(x, Tensor) else None for x in options]
        ctx.save_for_backward(*batch, *totals, *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_transforms("the gradient of linear_cross_entropy", grad_output, _INSTEAD)
        saved = ctx.saved_tensors
        batch = Batch(*saved[:4])
        totals = Totals(*saved[4:7])
        with torch.no_grad():
            if ctx.computes_later:
                arguments.check_storages(*batch[:3])
                options = Options(
                    *(
                        given if tensor is None else tensor
                        for given, tensor in zip(ctx.options, saved[7:], strict=True)
                    )
                )
                backend, dtype = ctx.call
                totals = _new_totals(batch, ctx.needs_input_grad[:3], None)
                scale = grad_output.contiguous()
                op.run(backend, batch, dtype, options, None, scale, totals, ctx.shard)
            else:
                totals = Totals(
                    *(
                        None if total is None or x is None else _scaled(total, grad_output, x.dtype)
                        for total, x in zip(totals, batch[:3], strict=True)
                    )
                )
        grads: list[Tensor | None] = list(totals)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            depends_on = [x for x in (*batch[:3], grad_output) if x is not None]
            grads = [
                None
                if grad is None
                else DifferentiableOnce.apply("linear_cross_entropy", grad, *depends_on)
                for grad in grads
            ]
        return *grads, *(None,) * (5 + len(Options._fields))


def _new_totals(batch: Batch, wanted: tuple[bool, ...], sum_dtype: torch.dtype | None) -> Totals:
    """Memory for the gradients that are wanted, those of weight and bias of `sum_dtype`, by default
    their own."""
    hidden, weight, bias, _ = batch
    return Totals(
        torch.empty_like(hidden) if wanted[0] else None,
        torch.zeros(weight.shape, dtype=sum_dtype or weight.dtype, device=weight.device)
        if wanted[1]
        else None,
        torch.zeros(bias.shape, dtype=sum_dtype or bias.dtype, device=bias.device)
        if wanted[2] and bias is not None
        else None,
    )


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor, rounded once to dtype."""
    if total.dtype == dtype or torch.compiler.is_compiling():
        return (total * factor).to(dtype)
    result = torch.empty_like(total, dtype=dtype)
    # In parts, so that the product in float32 takes little memory.
    for part, part_of_total in zip(result.split(4096), total.split(4096), strict=True):
        torch.mul(part_of_total, factor, out=part)
    return result
