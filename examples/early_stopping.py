"""A model and data of one's own: early stopping, and the weights of the best epoch.

python examples/early_stopping.py
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_train import EpochEnd, TrainConfig, evaluate, fit

PATIENCE = 5


class Best:
    """Keeps the weights of the epoch with the lowest validation loss, and stops after a while
    without a lower one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loss = math.inf
        self.epoch = 0
        self.weights: dict[str, Any] = {}

    def __call__(self, end: EpochEnd) -> bool:
        assert end.validation is not None
        if end.validation.loss < self.loss:
            self.loss = end.validation.loss
            self.epoch = end.number
            self.weights = copy.deepcopy(self.model.state_dict())
        return end.number - self.epoch >= PATIENCE


def main() -> None:
    torch.manual_seed(0)
    points = torch.randn(400, 2)
    inside = (points.norm(dim=1) < 1.2).long()
    train = DataLoader(TensorDataset(points[:200], inside[:200]), batch_size=20, shuffle=True)
    validation = [(points[200:], inside[200:])]
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    best = Best(model)
    task: dict[str, Any] = {"task_type": "classification"}
    epochs = fit(
        model,
        train,
        optimizer,
        TrainConfig(),
        epochs=100,
        validation=validation,
        on_epoch=best,
        **task,
    )
    model.load_state_dict(best.weights)
    result = evaluate(model, validation, TrainConfig(), **task)
    print(
        f"epoch {best.epoch} of {len(epochs)}: loss {result.loss:.4f}, {result.accuracy:.1%} right"
    )


if __name__ == "__main__":
    main()
