"""Batches of a classifier with ignored rows, and a metric that two processes share."""

from pathlib import Path

import torch
from torch import Tensor

CLASSES = 6
Batches = list[tuple[Tensor, Tensor]]


def batches() -> Batches:
    """Batches of 6, 1 and 7 rows; every seventh row is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(14, CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (14,), generator=generator)
    targets[::7] = -100
    sizes = [6, 1, 7]
    return list(zip(logits.split(sizes), targets.split(sizes), strict=True))


def metric_of_a_rank(rank: int, directory: Path) -> list[float]:
    """Accuracy and loss that two processes find, each of which sees a part of the batches."""
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metrics = [MeterMetric(), MeterMetric(value="loss")]
    for number, batch in enumerate(batches()):
        if number % 2 == rank:
            for metric in metrics:
                metric.update(*batch)
    return [metric.compute().item() for metric in metrics]
