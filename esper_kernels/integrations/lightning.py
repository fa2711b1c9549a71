"""Lightning: the statistics of the gradients in a callback, on the device and in one pass.

The loss needs nothing of this: return `cross_entropy(logits, targets)` from `training_step`, or
`metric.loss(logits, targets)` of `torchmetrics.MeterMetric` and `self.log("accuracy", metric)`.
"""

import lightning
from torch.optim import Optimizer

from esper_kernels.ops.grad_stats import grad_stats


class GradientStatistics(lightning.Callback):
    """Logs gradient_norm, gradient_max, gradient_nans and gradient_infs before each optimizer
    step, as device tensors: what reads them is the logger, every `log_every_n_steps`."""

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        stats = grad_stats([p.grad for p in parameters])
        pl_module.log_dict(
            {
                "gradient_norm": stats.total_norm,
                "gradient_max": stats.max_abs.max(),
                "gradient_nans": stats.nans.sum().double(),
                "gradient_infs": stats.infs.sum().double(),
            }
        )
