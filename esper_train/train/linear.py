"""The loss of a language model's batch without its logits: `train.linear_loss`.

A model takes part by having `features(inputs)`, the hidden states [N, T, H] before its last layer,
and `output_layer`, that layer, an `nn.Linear`: its logits are `output_layer(features(inputs))`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from esper_kernels import KernelConfig, Meter, linear_cross_entropy_step
from esper_train.train.loss import Divisor, Loss, is_customised

TASK_TYPES = ("classification", "lm")


def require_linear_loss(loss: Loss, has_own_forward: bool) -> None:
    """`ValueError` with the reason where no batch could be served without its logits."""
    reason = None
    if loss.task_type not in TASK_TYPES:
        reason = f"serves the task types {', '.join(TASK_TYPES)}, got {loss.task_type!r}"
    elif loss.own is not None:
        reason = f"takes no criterion but nn.CrossEntropyLoss, got {loss.own!r:.80}"
    elif has_own_forward:
        reason = "calls the model's features, so it takes no forward="
    if reason is not None:
        raise ValueError(f"train.linear_loss {reason}; leave one of them out")


def output_layer(model: nn.Module) -> nn.Linear:
    """The last layer of a model that has `features`; `ValueError` where it has not, or where
    calling the model or the layer may do more than the product: neither of them is called."""
    layer = getattr(model, "output_layer", None)
    if not callable(getattr(model, "features", None)) or type(layer) is not nn.Linear:
        raise ValueError(
            "train.linear_loss needs a model with features(inputs) and output_layer, an nn.Linear "
            f"whose output are the logits, got {type(model).__name__} with output_layer "
            f"{layer!r:.80}; add them (a subclass may compute something else), or leave "
            "train.linear_loss out"
        )
    for name, module in (("the model", model), ("output_layer", layer)):
        if is_customised(module):
            raise ValueError(
                f"train.linear_loss calls features alone, so it would leave out the hooks, or the "
                f"replaced forward, of {name}; remove them, or leave train.linear_loss out"
            )
    return layer


def learn(
    hidden: Tensor,
    layer: nn.Linear,
    loss: Loss,
    targets: Tensor,
    meter: Meter | None,
    divisor: Divisor | None,
    scale: Tensor | None,
    kernel: KernelConfig,
) -> tuple[list[torch.autograd.graph.GradientEdge], list[Tensor]]:
    """Loss and counts of the batch, into the meter; the places where the backward pass begins, and
    the gradients there."""
    classes = layer.out_features
    options = loss.options
    gradients = linear_cross_entropy_step(
        hidden,
        layer.weight,
        loss.within(targets, classes, meter) if loss.masks else targets,
        meter,
        bias=layer.bias,
        class_weight=options.get("weight"),
        ignore_index=loss.ignored,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction=options.get("reduction", "mean"),
        z_loss=options.get("z_loss", 0.0),
        softcap=options.get("softcap"),
        normalizer=None if divisor is None else divisor(classes),
        grad_scale=scale,
        config=kernel,
    )
    tensors: Sequence[Tensor | None] = (hidden, layer.weight, layer.bias)
    found = [(x, g) for x, g in zip(tensors, gradients, strict=True) if g is not None]
    return [get_gradient_edge(x) for x, _ in found if x is not None], [g for _, g in found]
