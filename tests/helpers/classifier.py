"""A small classifier and a small language model, with batches for them."""

import torch
from torch import Tensor, nn

from esper_train import (
    TrainConfig,
)

CONFIG = TrainConfig()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def batches(sizes: tuple[int, ...] = (8, 8, 3), seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 3, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


class LanguageModel(nn.Module):
    """Tokens [N, T] to logits [N, T, 7]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
