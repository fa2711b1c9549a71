"""Public names of the audited training module, with the same meaning, on top of our kernels.

They help existing code to migrate. New code uses what `docs/audited-names.md` lists beside each
name, and nothing in this package imports them.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels import GradHealth, GradStats, Meter, cross_entropy, grad_stats
from esper_train.base.names import require_known
from esper_train.train.loss import Criterion, criterion_options

__all__ = [
    "DualGradientStats",
    "GradientHealthMetrics",
    "SeedGradientCollector",
    "collect_dual_gradients",
    "collect_dual_gradients_async",
    "collect_seed_gradients",
    "collect_seed_gradients_async",
    "compute_task_loss",
    "compute_task_loss_with_metrics",
    "materialize_dual_grad_stats",
    "materialize_grad_stats",
]

GradientHealthMetrics = GradHealth
"""All the numbers, with `is_healthy()` and `to_dict()`."""


class SeedGradientCollector(NamedTuple):
    """Measures the gradients of any parameters, with given thresholds on a tensor's L2 norm."""

    vanishing_threshold: float = 1e-7
    exploding_threshold: float = 100.0

    def collect(self, parameters: Iterable[Tensor]) -> dict[str, float | bool]:
        """Measure and read the four audited numbers: one host sync."""
        return materialize_grad_stats(self.collect_async(parameters))

    def collect_async(self, parameters: Iterable[Tensor]) -> GradStats:
        """Measure on the device, without a host sync. Parameters without a gradient are left
        out."""
        return grad_stats(
            [p.grad for p in parameters],
            vanishing=self.vanishing_threshold,
            exploding=self.exploding_threshold,
        )


def collect_seed_gradients_async(
    parameters: Iterable[Tensor],
    vanishing_threshold: float = 1e-7,
    exploding_threshold: float = 100.0,
) -> GradStats:
    """`SeedGradientCollector.collect_async` in one call."""
    return SeedGradientCollector(vanishing_threshold, exploding_threshold).collect_async(parameters)


def materialize_grad_stats(stats: GradStats) -> dict[str, float | bool]:
    """Read the four audited numbers from `collect_seed_gradients_async`: the host sync."""
    health = stats.compute()
    return {
        "gradient_norm": health.gradient_norm,
        "gradient_health": health.gradient_health,
        "has_vanishing": health.has_vanishing,
        "has_exploding": health.has_exploding,
    }


def collect_seed_gradients(
    parameters: Iterable[Tensor],
    vanishing_threshold: float = 1e-7,
    exploding_threshold: float = 100.0,
    return_enhanced: bool = False,
) -> dict[str, float | bool] | GradientHealthMetrics:
    """Measure and read: the four audited numbers, or all of them if `return_enhanced`."""
    stats = collect_seed_gradients_async(parameters, vanishing_threshold, exploding_threshold)
    return stats.compute() if return_enhanced else materialize_grad_stats(stats)


class DualGradientStats(NamedTuple):
    """L2 norms of the gradients of host and seed, and how many parameters have them."""

    host_grad_norm: float
    host_param_count: int
    seed_grad_norm: float
    seed_param_count: int

    @property
    def normalized_ratio(self) -> float:
        """(seed norm / sqrt(seed parameters)) / (host norm / sqrt(host parameters) + 1e-8).

        0 if either norm is NaN or below 1e-8, or if either has no parameters.
        """
        if min(self.host_param_count, self.seed_param_count) == 0:
            return 0.0
        if not (self.host_grad_norm >= 1e-8 and self.seed_grad_norm >= 1e-8):
            return 0.0
        host = self.host_grad_norm / math.sqrt(self.host_param_count)
        return self.seed_grad_norm / math.sqrt(self.seed_param_count) / (host + 1e-8)


def collect_dual_gradients_async(
    host_parameters: Iterable[Tensor], seed_parameters: Iterable[Tensor]
) -> GradStats:
    """Measure both in one pass over the gradients, without a host sync."""
    return grad_stats(
        {
            "host": [p.grad for p in host_parameters],
            "seed": [p.grad for p in seed_parameters],
        }
    )


def materialize_dual_grad_stats(stats: GradStats) -> DualGradientStats:
    """Read the norms and counts from `collect_dual_gradients_async`: the host sync."""
    groups = stats.compute().groups
    host = groups["host"]
    seed = groups["seed"]
    return DualGradientStats(
        host_grad_norm=host.gradient_norm,
        host_param_count=host.elements,
        seed_grad_norm=seed.gradient_norm,
        seed_param_count=seed.elements,
    )


def collect_dual_gradients(
    host_parameters: Iterable[Tensor], seed_parameters: Iterable[Tensor]
) -> DualGradientStats:
    """Measure and read both: one host sync."""
    return materialize_dual_grad_stats(
        collect_dual_gradients_async(host_parameters, seed_parameters)
    )


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
    criterion: a cross entropy (torch's or `esper_kernels`') or None runs as the fused op; any other
    gets rows [M, V] and targets [M]. Raises `ValueError` for an unknown task type.
    """
    require_known("task type", task_type, ("classification", "lm"))
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
