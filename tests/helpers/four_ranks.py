"""Runs of four processes: a life of seeds, single precision, and a host with batch norm."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_train import (
    DistributedConfig,
    HostConfig,
    RunConfig,
    Splits,
    Task,
    run_fit,
    run_heuristic_episode,
)
from esper_train.morph.host import Host, cnn_host
from tests.helpers import sharded
from tests.helpers.own import perceptron, table_data
from tests.helpers.ranks import DDP, life_of, tables, whole_weights
from tests.helpers.scripted import Script, germinate
from tests.helpers.sharded import FSDP2

WORLD = 4
CONFIG = replace(sharded.CONFIG, max_epochs=4, batch_size=8)


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


def grown(config: RunConfig = CONFIG) -> dict[str, Tensor]:
    """The weights after 20 steps, in most of which a seed learns beside the network."""
    script = Script(e1=germinate("early", "bottleneck"))
    return whole_weights(run_heuristic_episode(config, task=single(), policy=script).model)


LIFE = partial(tables, 33, 61)
"""With a rollback; the last batch of an epoch has one row for four ranks."""


def all_runs(rank: int, directory: Path) -> dict[str, dict[str, Any]]:
    """The findings about a life of seeds, and the weights of a short one, by strategy."""
    return {
        distributed.strategy: {
            "life": life_of(LIFE, "bottleneck", rank, directory, distributed=distributed),
            "grown": grown(replace(CONFIG, distributed=distributed)),
            "fits": all_weights(distributed),
        }
        for distributed in (DDP, FSDP2)
    }


def all_weights(distributed: DistributedConfig) -> dict[str, dict[str, Tensor]]:
    """The weights after each plain training, by task."""
    return {
        task.name: weights(task, replace(CONFIG, distributed=distributed))
        for task in (single(), images(by_part=False))
    }
