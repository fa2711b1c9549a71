"""A stand-in for CUDA graphs on the CPU, and the small network that tests of captured steps train
with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper_train import (
    AmpConfig,
    EpochResult,
    GradConfig,
    OptimizerRegistry,
    TrainConfig,
    TrainStep,
    build_train_step,
)
from esper_train.train.capture import Capture, CudaGraphs, Work

RATE = 2.0**-4  # exact in float32, as the rates of a captured step are
MODES = [True, False]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"grad": GradConfig(clip_norm=0.1)},
    "unmeasured": {"grad": GradConfig(every=0)},
    "every second": {"grad": GradConfig(every=2)},
    "accumulated": {"accumulate": 2},
    "skip": {"on_bad_numbers": "skip"},
    "float16": {
        "amp": AmpConfig(dtype="float16", init_scale=1024.0, growth_interval=3),
        "on_bad_numbers": "warn",
    },
    "topk": {"topk": (1, 3)},
}
"""Configs of `TrainConfig` under which a captured step is compared with an eager one."""


class Tape(CudaGraphs):
    """A graph on the CPU: keeps a step's operations with the tensors they used, and repeats these,
    no Python of ours.

    Recording does the work, so the first replay does not. An operation whose result the host reads
    is refused.
    """

    def __init__(self) -> None:
        self.records = 0
        self.broken = False

    def run(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> Work:
        with Operations() as tape:
            work()
            if self.broken:
                raise RuntimeError("operation not permitted when stream is capturing")
        self.records += 1
        todo = iter([lambda: None])
        return lambda: next(todo, tape.repeat)()


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), (
            "the host reads within a captured step"
        )
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, result in self.done:
            for old, new in zip(
                tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def network() -> nn.Module:
    """A model with running statistics and random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(8, 5),
    )


def data(*sizes: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 3, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


def sgd(*parameters: Tensor) -> Optimizer:
    return SGD(parameters, lr=RATE, momentum=0.9, weight_decay=0.01, fused=True)


def adamw(*parameters: Tensor) -> Optimizer:
    return AdamW(parameters, lr=RATE, fused=True)


def halving(optimizer: Optimizer) -> LambdaLR:
    """Rates that are exact in float32."""
    return LambdaLR(optimizer, lambda step: 0.5 ** (step % 8))


def registry(model: nn.Module, make: Callable[..., Optimizer]) -> OptimizerRegistry:
    """Two groups, one with a schedule."""
    first, *rest = model.parameters()
    optimizers = OptimizerRegistry(rest=make(*rest))
    alone = make(first)
    optimizers.attach("first", alone, halving(alone))
    return optimizers


def captured(config: TrainConfig, task_type: str = "classification") -> tuple[TrainStep, Tape]:
    """A step whose graphs are tapes."""
    step = build_train_step(task_type, config)
    tape = Tape()
    step.capture = Capture(tape)
    return step, tape


def measures(result: EpochResult) -> dict[str, Any]:
    return {
        k: v for k, v in vars(result).items() if k not in ("seconds", "replayed", "not_replayed")
    }


def everything(model: nn.Module, optimizers: OptimizerRegistry) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "random": torch.get_rng_state(),
    }


def assert_same(found: Any, expected: Any) -> None:
    """Compare bit for bit; NaN equals NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
