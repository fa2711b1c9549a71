"""A linear classifier, six rows, and a call that trains it for one epoch."""

import torch
from torch import Tensor, nn

from esper_train import TrainConfig, train_one_epoch

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 2, 1, 1, 1, 0])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]


def train(model: nn.Module, batches: object, config: TrainConfig | None = None, **options: object):  # type: ignore[no-untyped-def]
    return train_one_epoch(
        model,
        batches,  # type: ignore[arg-type]
        sgd(model),
        config or TrainConfig(),
        task_type="classification",
        **options,  # type: ignore[arg-type]
    )
