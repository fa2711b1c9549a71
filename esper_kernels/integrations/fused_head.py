"""The head and the loss of Hugging Face's causal language models in one op, without their logits.

undo = patch(model, meter)
trainer.train()
undo()
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from esper_kernels.config import KernelConfig
from esper_kernels.integrations.huggingface import next_tokens
from esper_kernels.meter import Meter
from esper_kernels.ops.linear_cross_entropy import linear_cross_entropy

NEED_LOGITS = ("logits_to_keep", "shift_labels")


def patch(
    model: nn.Module, meter: Meter | None = None, *, config: KernelConfig | None = None
) -> Callable[[], None]:
    """Compute the loss of a causal language model by `linear_cross_entropy` while it trains.

    Calls in training mode with labels [B, T] then return their loss, no logits and no cache. All
    others, and those with logits_to_keep or shift_labels, run the model's own forward.

    Tries the model on a few tokens first. Raises TypeError if its head is not an nn.Linear, and
    ValueError if its logits are not that layer of `base_model`'s output, as where they are capped.
    Returns a function that takes the patch off again.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    _check(model)
    stock = type(model).forward

    @functools.wraps(stock)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None or not self.training or any(name in kwargs for name in NEED_LOGITS):
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return stock(self, *args, labels=labels, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        loss = linear_cross_entropy(
            outputs[0],
            head.weight,
            next_tokens(labels),
            bias=head.bias,
            normalizer=num_items_in_batch,
            meter=meter,
            config=config,
        )
        return CausalLMOutputWithPast(
            loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    model.forward = patched = MethodType(forward, model)

    def undo() -> None:
        if model.__dict__.get("forward") is not patched:
            raise RuntimeError("the model's forward was replaced after `patch`; undo that first")
        del model.forward

    return undo


def _check(model: Any) -> None:
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"expected a causal language model of transformers, got {type(model).__name__}; with "
            "other models call linear_cross_entropy"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(f"expected a head that is an nn.Linear, got {type(head).__name__}")
    if "forward" in model.__dict__:
        raise ValueError("the model's forward is patched already; undo that first")
    tokens = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        same = torch.equal(logits, head(model.base_model(input_ids=tokens)[0]))
    model.train(training)
    if not same:
        raise ValueError(
            f"the logits of {type(model).__name__} are not its head of its base model's output, "
            "so the loss cannot be computed from these; use causal_lm_loss, which takes logits"
        )
