"""A task of one's own: digits from an augmenting loader, with one's own host and criterion.

esper-train heuristic --task examples.own_task:task --out runs/own
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

from esper_train import Host, HostConfig, Splits, Task


def shifted(samples):
    images, targets = default_collate(samples)
    return images.roll(int(torch.randint(-1, 2, ())), dims=3), targets


def load() -> Splits:
    images, targets = map(torch.tensor, load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, targets)
    parts = random_split(data, [0.6, 0.2, 0.2], torch.Generator().manual_seed(0))
    train = DataLoader(parts[0], batch_size=64, shuffle=True, collate_fn=shifted)
    return Splits(train=train, validation=parts[1], test=parts[2])


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def build_host(config: HostConfig) -> Host:
    blocks = {"early": block(1, 4), "mid": block(4, 8), "late": block(8, 16)}
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    return Host("cnn", blocks, head, slot_channels={"early": 4, "mid": 8, "late": 16})


task = Task(
    name="shifted-digits",
    task_type="classification",
    num_classes=10,
    load=load,
    build_host=build_host,
    criterion=nn.MultiMarginLoss(),
)
