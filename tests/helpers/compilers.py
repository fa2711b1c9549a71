"""A compiler that counts what it compiles, and configs that name a compiler."""

import torch
from torch import Tensor

from esper_train import CompileConfig, TrainConfig


class Counting:
    """A compiler backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


def compiled_config(backend: object, **options: object) -> TrainConfig:
    return TrainConfig(compile=CompileConfig(enabled=True, backend=backend, **options))  # type: ignore[arg-type]
