"""The rise of alpha while a seed is blended in: schedules from progress to alpha, and a learned
gate."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from esper_train.base.names import require_known
from esper_train.morph.blueprints import zeroed


def linear(progress: float) -> float:
    """Alpha equals progress."""
    return min(max(progress, 0.0), 1.0)


def sigmoid(progress: float) -> float:
    """Slow, fast, slow: 1 / (1 + exp(-12 (progress - 0.5)))."""
    return 1.0 / (1.0 + math.exp(-12.0 * (progress - 0.5)))


BLENDS: Mapping[str, Callable[[float], float]] = {
    "linear": linear,
    "sigmoid": sigmoid,
    "gated": linear,
}
"""The schedules by name. "gated" also has a `Gate`, which changes the schedule for each sample."""


def get_blend(name: str) -> Callable[[float], float]:
    """The schedule of this name; `ValueError` lists the known names."""
    require_known("blend", name, BLENDS)
    return BLENDS[name]


class Gate(nn.Module):
    """A learned preference g in (0, 1) for the seed: per sample of feature maps, per token of
    sequences.

    `forward(x, alpha)` changes the scheduled alpha to alpha (alpha + 2 g (1 - alpha)). That is 0 at
    0 and 1 at 1 for any g, and alpha itself at g = 1/2, where the gate starts. The gate of a token
    depends on that token alone, so the model stays causal.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        last = zeroed(nn.Linear(hidden, 1))
        self.score = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), last)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        """x [N, C, H, W] gives [N, 1, 1, 1], x [N, T, C] gives [N, T, 1]."""
        is_map = x.dim() == 4
        g = torch.sigmoid(self.score(x.mean((2, 3)) if is_map else x))
        return alpha * (alpha + 2 * (g[:, :, None, None] if is_map else g) * (1 - alpha))
