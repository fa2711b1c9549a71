"""A torchmetrics Metric around a `Meter`: the loss of a batch counts it, in the same pass."""

from typing import Any, Unpack

import torchmetrics
from torch import Tensor

from esper_kernels.meter import SUMS, Meter
from esper_kernels.ops.cross_entropy import cross_entropy
from esper_kernels.ops.cross_entropy.arguments import CommonOptions


class MeterMetric(torchmetrics.Metric):
    """Loss and accuracies of an epoch, summed in float64 and int64, and over all ranks.

    topk: the k of the top-k accuracies. value: which of `measures` `compute` returns, for
    `self.log("accuracy", metric)` of a LightningModule. Nothing here waits for the device.
    """

    full_state_update = False  # or forward would count each batch twice
    sums: Tensor
    counts: Tensor

    def __init__(
        self, *, topk: tuple[int, ...] = (1,), value: str = "accuracy", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._meter = Meter("cpu", topk=topk)
        self.value = value
        self.add_state("sums", self._meter.sums.clone(), dist_reduce_fx="sum")
        self.add_state("counts", self._meter.counts.clone(), dist_reduce_fx="sum")
        if value not in self.measures():
            raise ValueError(f"value must be one of {list(self.measures())}, got {value!r}")

    def loss(self, logits: Tensor, targets: Tensor, **options: Unpack[CommonOptions]) -> Tensor:
        """The differentiable loss; arguments and options of `cross_entropy`."""
        loss = cross_entropy(logits, targets, meter=self.meter, **options)
        self.update()
        return loss

    def update(self, logits: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Count a batch; without arguments, one that `loss` has counted."""
        if logits is not None:
            cross_entropy(logits, targets, meter=self.meter)  # type: ignore[arg-type]

    @property
    def meter(self) -> Meter:
        """A meter that counts in the states of this metric, which torchmetrics replaces."""
        if self._meter.device != self.sums.device:
            self._meter = Meter(self.sums.device, topk=self._meter.topk)
        self._meter.sums = self.sums
        self._meter.counts = self.counts
        return self._meter

    def measures(self) -> dict[str, Tensor]:
        """loss, perplexity, accuracy and, for each k above 1, top{k}_accuracy: float64 [] on the
        device, of this rank alone; NaN before the first batch."""
        sums = dict(zip(SUMS, self.sums, strict=True))
        counts = self.meter.on_device()
        loss = sums["loss_sum"] / sums["weight_sum"]
        found = {"loss": loss, "perplexity": loss.exp()}
        for k in self.meter.topk:
            name = "accuracy" if k == 1 else f"top{k}_accuracy"
            found[name] = counts[f"correct@{k}"] / counts["valid"]
        return found

    def compute(self) -> Tensor:
        """The measure named by `value`, of all ranks."""
        return self.measures()[self.value]
