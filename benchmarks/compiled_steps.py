"""One compiled function for every task and structure, or one for each: the audit's question, in figures.

    python -m benchmarks.compiled_steps    # writes results/compiled-steps.json

The same small networks, of ranks 2 and 3, are called in turn through one compiled function, and each through one of its
own, made as `TrainStep` makes them. torch keeps what it compiled by function, tries one after the other, and runs
eagerly beyond 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import record
from esper_train import CompileConfig, TrainConfig, build_train_step

MOST = 10  # torch stops compiling a function after 8 programs


def network(number: int) -> tuple[nn.Module, Tensor]:
    """A network of another structure for every number, and an input: logits of a classifier, or of a language model."""
    layers = [nn.Linear(8, 8) for _ in range(1 + number // 2)]
    return nn.Sequential(*layers), torch.randn(4, 8) if number % 2 == 0 else torch.randn(4, 6, 8)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """A call of one of them, where each is called in turn: the median of blocks."""
    times = []
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(50):
            for call in calls:
                call()
        times.append((time.perf_counter() - started) / (50 * len(calls)))
    return 1e6 * median(times)


def measure(shared: bool) -> list[dict[str, Any]]:
    """After each further network: what a call takes, and how many were compiled."""
    torch._dynamo.reset()
    counters.clear()
    step = build_train_step("classification", TrainConfig(compile=CompileConfig(enabled=True, dynamic=False)))
    one, calls, rows = step._compile(), [], []
    for number in range(MOST):
        model, inputs = network(number)
        program = one if shared else step._compile()
        calls.append(lambda program=program, model=model, inputs=inputs: program(model, inputs, {}))
        calls[-1]()
        rows.append(
            {
                "networks": number + 1,
                "compiled": counters["stats"]["unique_graphs"],
                "us a call": microseconds(calls),
            }
        )
    return rows


if __name__ == "__main__":
    figures = {"one for all": measure(shared=True), "one each": measure(shared=False)}
    for name, rows in figures.items():
        for row in rows:
            print(name, row)
    print(record.write("compiled-steps", figures))
