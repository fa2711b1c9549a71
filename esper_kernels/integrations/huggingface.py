"""Hugging Face's Trainer: our loss as its `compute_loss_func`, and the metrics in its log.

    class MeteredTrainer(MeterLogs, Trainer): ...

    meter = Meter(device, topk=(1, 5))
    trainer = MeteredTrainer(model, args, compute_loss_func=causal_lm_loss(meter), meter=meter, ...)

Nothing here imports transformers. Source: transformers 5.23, `trainer.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from esper_kernels.config import KernelConfig
from esper_kernels.meter import Meter, MeterResult
from esper_kernels.ops.cross_entropy import cross_entropy

IGNORED = -100  # the label that Hugging Face's collators give to padding


def next_tokens(labels: Tensor) -> Tensor:
    """The target of each position [..., T]: the label after it, and none at the end.

    Labels are shifted instead of logits, which would otherwise be copied.
    """
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def causal_lm_loss(
    meter: Meter | None = None,
    *,
    eval_meter: Meter | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    config: KernelConfig | None = None,
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for causal language models: the stock loss, and its counts.

    meter counts the batches that are trained on, eval_meter those without gradients, as in
    `Trainer.evaluate`. label_smoothing and z_loss as for `cross_entropy`.

    The function takes outputs with logits [B, T, V], labels [B, T] (-100: ignored), and the number
    of targets in all accumulated batches: an int, a 0-d tensor, or None for those of this batch.
    Returns the loss [], float32. The last position of each sequence counts as ignored.
    """

    def loss(
        outputs: Mapping[str, Tensor],
        labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            outputs["logits"],
            next_tokens(labels),
            normalizer=num_items_in_batch,
            meter=meter if torch.is_grad_enabled() else eval_meter,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            config=config,
        )

    return loss


def measures(result: MeterResult, prefix: str = "") -> dict[str, float]:
    """Accuracy, top-k accuracies and perplexity under the names of a log."""
    top = {f"{prefix}top{k}_accuracy": result.accuracy_at(k) for k in result.correct if k > 1}
    return {
        f"{prefix}accuracy": result.accuracy,
        **top,
        f"{prefix}perplexity": result.perplexity,
    }


class MeterLogs:
    """A mixin, before Trainer among the bases, that adds `measures` to the Trainer's log entries.

    meter: counts what was trained on since the last entry, as the loss beside it does. eval_meter:
        counts the data of an evaluation; its measures are returned by `evaluate` too.

    Meters are read and reset only here, once per entry, where the Trainer has just read its own
    loss, so no step waits for the device.
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter | None = None,
        eval_meter: Meter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.eval_meter = eval_meter

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        losses = [name for name in logs if name.endswith("loss") and name != "train_loss"]
        for name in losses:  # "loss" while training, "eval_loss" and the like after evaluating
            meter = self.meter if name == "loss" else self.eval_meter
            if meter is not None:
                if dist.is_initialized():
                    meter.all_reduce()
                logs.update(measures(meter.compute(), prefix=name.removesuffix("loss")))
                meter.reset()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
