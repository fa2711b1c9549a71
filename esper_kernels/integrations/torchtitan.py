"""torchtitan 0.3: our loss as its loss component, which counts what it sees.

trainer_config.loss = MeteredLoss.Config(topk=(1, 5))
...
trainer.loss_fn.meter.compute()
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss

from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import cross_entropy


class MeteredLoss(BaseLoss):
    """torchtitan's cross entropy by `esper_kernels.cross_entropy`.

    `meter` is made with the first batch, on its device; it is None before. Nothing is compiled:
    the loss is one op.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """topk: the k that the meter counts. z_loss: as for `cross_entropy`."""

        topk: tuple[int, ...] = (1,)
        z_loss: float = 0.0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.config = config
        self.meter: Meter | None = None

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses of pred [B, T, V] and labels [B, T], divided by
        global_valid_tokens [] if that is given; and no further metrics."""
        if isinstance(pred, DTensor):
            raise TypeError(
                "expected logits of all classes, got a DTensor; turn loss parallelism off, or use "
                "vocab_parallel_cross_entropy"
            )
        if self.meter is None:
            self.meter = Meter(pred.device, topk=self.config.topk)
        loss = cross_entropy(
            pred,
            labels,
            ignore_index=IGNORE_INDEX,
            z_loss=self.config.z_loss,
            reduction="sum" if global_valid_tokens is None else "mean",
            normalizer=global_valid_tokens,
            meter=self.meter,
        )
        return loss, {}
