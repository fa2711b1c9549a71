"""Calls of a model, and the place of the logits in its output."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.train.batches import described

Forward = Callable[..., Any]
"""A model, a method of it, or what the caller put in its place."""
ForwardOf = Callable[..., Any]
"""A function from a model and its inputs to its output."""


def call(forward: Forward, inputs: Any, arguments: Mapping[str, Any]) -> Any:
    """Call `forward`: a dict of inputs as keyword arguments, a tuple or list as one argument after
    another, anything else as the one argument."""
    if isinstance(inputs, Tensor):
        return forward(inputs, **arguments)
    if isinstance(inputs, dict):
        return forward(**inputs, **arguments)
    if isinstance(inputs, (tuple, list)):
        return forward(*inputs, **arguments)
    return forward(inputs, **arguments)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: itself if it is a tensor, its `.logits`, its `["logits"]`,
    or the first of a tuple or list. `TypeError` where none of these is a tensor."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        "expected logits as a tensor, as .logits or ['logits'] of the output, or as the first of a "
        f"tuple or list, got {described(output)} from the model; pass forward=, a function "
        "(model, inputs) -> logits"
    )


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """The device on which a call of the model with these inputs computes."""
    if isinstance(inputs, Tensor):
        return inputs.device
    return next(model.parameters()).device
