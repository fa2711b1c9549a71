"""A torchmetrics Metric around a `Meter`: the loss of a batch counts it, in the same pass."""

from typing import Any, Unpack

import torch.distributed as dist
import torchmetrics
from torch import Tensor

from esper_kernels.measures import ROW_SUMS
from esper_kernels.meter import SUMS, Meter
from esper_kernels.ops.cross_entropy import cross_entropy
from esper_kernels.ops.cross_entropy.arguments import CommonOptions


class _StateMeter(Meter):
    """A meter whose accumulators are the states of a metric."""

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        raise RuntimeError(
            "torchmetrics adds up the ranks of a metric itself; call metric.compute(), or read "
            "metric.meter.compute() inside metric.sync_context()"
        )


class MeterMetric(torchmetrics.Metric):
    """Loss, accuracies and more of an epoch, summed in float64 and int64, and over all ranks.

    topk, per_class, calibration_bins, entropy, confusion: what is counted, as for `Meter`. value:
    which of `measures` `compute` returns, for `self.log("accuracy", metric)` of a LightningModule.
    Nothing here waits for the device. What is no single number, such as the confusion matrix, is in
    `metric.meter.compute()`, which does; call that inside `metric.sync_context()` for all ranks.
    """

    full_state_update = False  # or forward would count each batch twice
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        topk: tuple[int, ...] = (1,),
        per_class: int = 0,
        calibration_bins: int = 0,
        entropy: bool = False,
        confusion: bool = False,
        value: str = "accuracy",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._meter = _StateMeter(
            "cpu",
            topk=topk,
            per_class=per_class,
            calibration_bins=calibration_bins,
            entropy=entropy,
            confusion=confusion,
        )
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
            self._meter.to(self.sums.device)
        self._meter.sums = self.sums
        self._meter.counts = self.counts
        return self._meter

    def measures(self) -> dict[str, Tensor]:
        """loss, perplexity, accuracy, for each k above 1 top{k}_accuracy, and of `MeterResult` nll,
        entropy and margin or nll and brier where they are counted: float64 [] on the device, of
        this rank alone; NaN before the first batch."""
        sums = dict(zip(SUMS, self.sums, strict=False))
        counts = self.meter.on_device()
        found = {"loss": sums["loss_sum"] / sums["weight_sum"]}
        for k in self.meter.topk:
            name = "accuracy" if k == 1 else f"top{k}_accuracy"
            found[name] = counts[f"correct@{k}"] / counts["valid"]
        if (plan := self.meter.measures) is not None:
            row_sums = dict(zip(ROW_SUMS, self.meter.measure_accumulators()[0], strict=False))
            rows = counts["valid"] - counts["nonfinite"]
            names = ["nll", "entropy", "margin"] if plan.entropy else []
            names += ["nll", "brier"] if plan.calibration_bins else []
            found |= {name: row_sums[name] / rows for name in names}
        found["perplexity"] = found.get("nll", found["loss"]).exp()
        return found

    def compute(self) -> Tensor:
        """The measure named by `value`, of all ranks."""
        return self.measures()[self.value]
