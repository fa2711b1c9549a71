"""How alpha rises while a seed is blended in: pure functions from progress in [0, 1] to alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from esper_train.names import unknown_name


def linear(progress: float) -> float:
    """Alpha equals progress."""
    return min(max(progress, 0.0), 1.0)


def sigmoid(progress: float) -> float:
    """Slow, fast, slow: 1 / (1 + exp(-12 (progress - 0.5)))."""
    return 1.0 / (1.0 + math.exp(-12.0 * (progress - 0.5)))


BLENDS: Mapping[str, Callable[[float], float]] = MappingProxyType({"linear": linear, "sigmoid": sigmoid})


def get_blend(name: str) -> Callable[[float], float]:
    """Look a schedule up by name; `ValueError` names the known ones."""
    if name not in BLENDS:
        raise unknown_name("blend", name, BLENDS)
    return BLENDS[name]
