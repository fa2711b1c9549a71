"""Runs of four processes: single precision, and a host with batch norm."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_train import HostConfig, RunConfig, Splits, Task, run_fit
from esper_train.morph.host import Host, cnn_host
from tests.helpers.own import perceptron, table_data
from tests.helpers.ranks import DDP, FSDP2, SHARDED_FIT, whole_weights

WORLD = 4
CONFIG = replace(SHARDED_FIT, max_epochs=4, batch_size=8)


class NormByPart(nn.BatchNorm2d):
    """Batch norm as four ranks have it: each part of the batch by itself, and running statistics
    of the first."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *others = x.chunk(WORLD)
        alone = partial(F.batch_norm, running_mean=None, running_var=None, training=True)
        return torch.cat(
            [super().forward(first)]
            + [alone(part, weight=self.weight, bias=self.bias, eps=self.eps) for part in others]
        )


def single_splits() -> Splits:
    """40 rows: 20 steps of 8 in four epochs."""
    inputs, targets = table_data(40 + 64)
    parts = zip(inputs.split([40, 32, 32]), targets.split([40, 32, 32]), strict=True)
    train, validation, test = parts
    return Splits(train=train, validation=validation, test=test)


def image_splits() -> Splits:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(32 + 32, 1, 4, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (len(inputs),), generator=generator)
    parts = zip(inputs.split([32, 16, 16]), targets.split([32, 16, 16]), strict=True)
    train, validation, test = parts
    return Splits(train=train, validation=validation, test=test)


def image_host(by_part: bool, config: HostConfig) -> Host:
    host = cnn_host(image_size=4, in_channels=1, num_classes=3, width=4, depth=2).double()
    for module in host.modules():
        if by_part and type(module) is nn.BatchNorm2d:
            module.__class__ = NormByPart
    return host


def single() -> Task:
    return Task(
        name="single-table",
        task_type="classification",
        num_classes=3,
        load=single_splits,
        build_host=perceptron,
    )


def images(by_part: bool) -> Task:
    return Task(
        name="double-images",
        task_type="classification",
        num_classes=3,
        load=image_splits,
        build_host=partial(image_host, by_part),
    )


def weights(task: Task, config: RunConfig = CONFIG) -> dict[str, Tensor]:
    return whole_weights(run_fit(config, task=task).model)


def all_weights(rank: int, directory: Path) -> dict[str, dict[str, Tensor]]:
    """The weights after each run, by strategy and task."""
    return {
        f"{distributed.strategy} {task.name}": weights(
            task, replace(CONFIG, distributed=distributed)
        )
        for distributed in (DDP, FSDP2)
        for task in (single(), images(by_part=False))
    }
