"""One compiled function for every task and structure, or one for each of them.

    python -m benchmarks compiled_steps    # writes results/compiled-steps.json

The same small networks, with inputs of 2 and 3 dimensions, are called in turn: first all through
one compiled function, then each through its own, made as `Compiler` makes it. torch stores the
programs of a function in a list, tries them one after another, and falls back to eager after 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import record
from esper_train import CompileConfig
from esper_train.train.compiled import Compiler

MOST = 10  # torch stops compiling a function after 8 programs


def network(number: int) -> tuple[nn.Module, Tensor]:
    """A network whose structure differs for every number, and an input [N, C] or [N, T, C]."""
    layers = [nn.Linear(8, 8) for _ in range(1 + number // 2)]
    return nn.Sequential(*layers), torch.randn(4, 8) if number % 2 == 0 else torch.randn(4, 6, 8)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median microseconds per call, when all of them are called in turn."""
    times = []
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(50):
            for call in calls:
                call()
        times.append((time.perf_counter() - started) / (50 * len(calls)))
    return 1e6 * median(times)


def measure(shared: bool) -> list[dict[str, Any]]:
    """A row for each number of networks: the time per call, and how many programs were compiled."""
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(enabled=True, dynamic=False)
    compiler = Compiler(config)
    one = compiler.program()
    calls: list[Callable[[], object]] = []
    rows: list[dict[str, Any]] = []
    for number in range(MOST):
        model, inputs = network(number)
        program = one if shared else compiler.program()
        calls.append(partial(program, model, inputs, {}))
        calls[-1]()
        rows.append(
            {
                "networks": number + 1,
                "compiled": counters["stats"]["unique_graphs"],
                "us per call": microseconds(calls),
            }
        )
    return rows


def main() -> None:
    """Measure both, print the rows, and write the figures."""
    record.parser("compiled_steps", __doc__).parse_args()
    figures = {"one for all": measure(shared=True), "one each": measure(shared=False)}
    for name, rows in figures.items():
        for row in rows:
            print(name, row)
    print(record.write("compiled-steps", figures))


if __name__ == "__main__":
    main()
