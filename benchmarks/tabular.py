"""A task of a table: scikit-learn's breast-cancer data, 569 rows of 30 features in 2 classes, with
a small multilayer perceptron as its host."""

from __future__ import annotations

import itertools

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from esper_train import Host, HostConfig, Splits, Task
from esper_train.morph.host import cut

SPLIT_SEED = 0
"""Every run has the same split: 60 % training, 20 % validation, 20 % test."""
FEATURES = 30
CLASSES = 2


def host(config: HostConfig) -> Host:
    """`depth` (3) layers of `width` (4) units, cut into segments, and a linear head."""
    width = config.width or 4
    sizes = [FEATURES, *[width] * (config.depth or 3)]
    blocks = [
        nn.Sequential(nn.Linear(before, after), nn.ReLU())
        for before, after in itertools.pairwise(sizes)
    ]
    segments = cut(blocks)
    return Host("features", segments, nn.Linear(width, CLASSES), dict.fromkeys(segments, width))


def load() -> Splits:
    """Inputs float32 [N, 30], standardized by the training split; targets [N]."""
    inputs, targets = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = order.split([341, 114, 114])
    seen = inputs[parts[0]]
    inputs = ((inputs - seen.mean(0)) / seen.std(0)).float()
    train, validation, test = ((inputs[rows], targets[rows].long()) for rows in parts)
    return Splits(train=train, validation=validation, test=test)


TASK = Task(
    name="breast-cancer",
    task_type="classification",
    num_classes=CLASSES,
    load=load,
    build_host=host,
)
