"""Public names of the audited training module, with the same meaning, on top of our kernels.

They help code to migrate. New code uses what `docs/audited-names.md` lists beside each name, and
nothing in this package imports them.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels import GradHealth, GradStats, Meter, cross_entropy, grad_stats
from esper_train.base.names import require_known
from esper_train.train.loss import LOGITS_DIMS, Criterion, criterion_options


def collect_seed_gradients_async(
    parameters: Iterable[Tensor],
    vanishing_threshold: float = 1e-7,
    exploding_threshold: float = 100.0,
) -> GradStats:
    """Gradient statistics on the device, without a host sync. Parameters without a gradient do not
    count."""
    grads = [p.grad for p in parameters]
    return grad_stats(grads, vanishing=vanishing_threshold, exploding=exploding_threshold)


def materialize_grad_stats(stats: GradStats) -> dict[str, float | bool]:
    """Read the four audited numbers from `collect_seed_gradients_async`: the host sync."""
    health = stats.compute()
    names = ("gradient_norm", "gradient_health", "has_vanishing", "has_exploding")
    return {name: getattr(health, name) for name in names}


def collect_seed_gradients(
    parameters: Iterable[Tensor],
    vanishing_threshold: float = 1e-7,
    exploding_threshold: float = 100.0,
    return_enhanced: bool = False,
) -> dict[str, float | bool] | GradHealth:
    """Measure and read: the four audited numbers, or all of `GradHealth` if `return_enhanced`."""
    stats = collect_seed_gradients_async(parameters, vanishing_threshold, exploding_threshold)
    return stats.compute() if return_enhanced else materialize_grad_stats(stats)


class DualGradientStats(NamedTuple):
    """Gradient norms and parameter counts of the host and of a seed."""

    host_norm: float
    host_params: int
    seed_norm: float
    seed_params: int

    @property
    def normalized_ratio(self) -> float:
        """(seed norm / sqrt(seed parameters)) / (host norm / sqrt(host parameters) + 1e-8).

        0 if either norm is NaN or below 1e-8, or if either has no parameters.
        """
        counts = min(self.host_params, self.seed_params)
        if counts == 0 or not (self.host_norm >= 1e-8 and self.seed_norm >= 1e-8):
            return 0.0
        host = self.host_norm / math.sqrt(self.host_params)
        return self.seed_norm / math.sqrt(self.seed_params) / (host + 1e-8)


def collect_dual_gradients(host: Iterable[Tensor], seed: Iterable[Tensor]) -> DualGradientStats:
    """Both norms, from one pass over the gradients and with one host sync."""
    groups = (
        grad_stats({"host": [p.grad for p in host], "seed": [p.grad for p in seed]})
        .compute()
        .groups
    )
    h = groups["host"]
    s = groups["seed"]
    return DualGradientStats(h.gradient_norm, h.elements, s.gradient_norm, s.elements)


def compute_task_loss(
    outputs: Tensor, targets: Tensor, criterion: Criterion | None, task_type: str
) -> Tensor:
    """The mean loss of a batch; see `compute_task_loss_with_metrics`."""
    return compute_task_loss_with_metrics(outputs, targets, criterion, task_type)[0]


def compute_task_loss_with_metrics(
    outputs: Tensor, targets: Tensor, criterion: Criterion | None, task_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the correct and valid counts (int64 [], on the device).

    outputs: logits [N, V], or [N, T, V] for "lm".
    criterion: `nn.CrossEntropyLoss` or None runs as the fused op; any other gets rows [M, V] and
    targets [M]. Raises `ValueError` for an unknown task type.
    """
    require_known("task type", task_type, LOGITS_DIMS)
    meter = Meter(outputs.device)
    options = criterion_options(criterion)
    if criterion is None or options is not None:
        loss = cross_entropy(outputs, targets, meter=meter, **(options or {}))
    else:
        loss = criterion(outputs.flatten(0, -2), targets.flatten())
        with torch.no_grad():
            cross_entropy(outputs, targets, meter=meter)
    counts = meter.on_device()
    return loss, counts["correct@1"], counts["valid"]
