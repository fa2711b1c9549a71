"""Small tasks of one's own for tests: a residual network on images, a perceptron on tables.

`--task tests.helpers.own:table` finds one from the root of the tree.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper_train import Blueprint, Host, HostConfig, RunConfig, Splits, Task
from esper_train.morph.blueprints import Residual
from tests.helpers.scripted import EASY

CLASSES = 3
COLUMNS = 6
NOT_A_TASK = "words"
SLOTS = ("early", "mid")
CONFIG = RunConfig(max_epochs=4, batch_size=8, slots=SLOTS, growth=EASY, keep="last")
"""Settings of a short run of the table."""


class Block(nn.Module):
    """x + f(x) at half the size (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def residual_host(config: HostConfig) -> Host:
    """A residual network for images [N, 1, 8, 8], with slots `one` and `two`."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return Host("cnn", {"one": Block(1, 4), "two": Block(4, 8)}, head, {"one": 4, "two": 8})


def perceptron(config: HostConfig) -> Host:
    """A multilayer perceptron for rows [N, COLUMNS], with slots `early` and `mid`."""
    width = config.width or 12
    segments = {
        "early": nn.Sequential(nn.Linear(COLUMNS, width), nn.ReLU()),
        "mid": nn.Sequential(nn.Linear(width, width), nn.ReLU()),
    }
    return Host("features", segments, nn.Linear(width, CLASSES), dict.fromkeys(segments, width))


def table_data(rows: int = 96) -> tuple[Tensor, Tensor]:
    """Rows whose class is that of the largest of three sums of columns."""
    inputs = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    return inputs, inputs.unflatten(1, (CLASSES, 2)).sum(2).argmax(1)


def load_table() -> Splits:
    inputs, targets = table_data()
    parts = zip(inputs.split(32), targets.split(32), strict=True)
    train, validation, test = parts
    return Splits(train=train, validation=validation, test=test)


def load_images() -> Splits:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % CLASSES
    images = torch.randn(60, 1, 8, 8, generator=generator) + targets[:, None, None, None]
    parts = zip(images.split(20), targets.split(20), strict=True)
    train, validation, test = (TensorDataset(*part) for part in parts)
    return Splits(train=train, validation=validation, test=test)


def load_shuffled() -> Splits:
    """The table from a loader that shuffles and adds noise."""
    splits = load_table()
    train = TensorDataset(*splits.train)  # type: ignore[misc]

    def noisy(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return inputs + 0.1 * torch.randn(inputs.shape), targets

    loader = DataLoader(train, batch_size=8, shuffle=True, collate_fn=noisy)
    return replace(splits, train=loader)


class NoisyRows(TensorDataset):
    """Samples with noise of their own."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, t = super().__getitem__(row)
        return x + 0.1 * torch.randn(x.shape), t


def load_sampled() -> Splits:
    splits = load_table()
    return replace(splits, train=NoisyRows(*splits.train))  # type: ignore[misc]


def add_noise(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs + 0.1 * torch.randn_like(inputs), targets


def _doubled(channels: int) -> nn.Module:
    return Residual(nn.Linear(channels, 2 * channels), nn.Tanh(), nn.Linear(2 * channels, channels))


table = Task(
    name="table",
    task_type="classification",
    num_classes=CLASSES,
    load=load_table,
    build_host=perceptron,
    blueprints=(Blueprint("doubled", "features", _doubled),),
)
sampled = replace(table, name="sampled-table", load=load_sampled)
augmented = replace(table, name="augmented-table", augment=add_noise)
shuffled = replace(table, name="shuffled-table", load=load_shuffled)
images = replace(table, name="images", load=load_images, build_host=residual_host, blueprints=())
