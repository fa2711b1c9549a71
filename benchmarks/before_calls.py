"""The calls that `before` times, in a process of its own for each checkout.

It is run by its path and imports nothing of this folder, whose other modules may be unknown to the
kernels of an earlier checkout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import esper_kernels
from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats

SECONDS = 0.02
"""What a call is repeated for each time."""


def calls_of(shape: str) -> Mapping[str, Callable[[], Any]]:
    """The calls that both checkouts have in common."""
    generator = torch.Generator().manual_seed(0)
    config = KernelConfig(backend="cpp")  # a checkout that is not built is refused
    if shape.startswith("grads:"):
        tensors, size = map(int, shape.removeprefix("grads:").split("x"))
        grads = [torch.randn(size, generator=generator) for _ in range(tensors)]
        stats = grad_stats(grads, config=config)
        return {"grad_stats": lambda: grad_stats(grads, out=stats, config=config)}
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    rows, classes = map(int, shape.removeprefix("bf16:").split("x"))
    logits = (torch.randn(rows, classes, generator=generator) * 3).to(dtype)
    targets = torch.randint(classes, (rows,), generator=generator)
    out = torch.empty_like(logits)
    meter = Meter("cpu")

    def evaluate() -> None:
        with torch.no_grad():
            cross_entropy(logits, targets, meter=meter, config=config)

    return {
        "step": lambda: cross_entropy_step(logits, targets, meter, out=out, config=config),
        "loss only": evaluate,
    }


def serve(shape: str) -> None:
    """Time the call that each line of the input names, and answer in microseconds."""
    calls = calls_of(shape)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            started = time.perf_counter()
            call()
        repeats[name] = max(1, round(SECONDS / (time.perf_counter() - started)))
    checkout = Path(esper_kernels.__file__).resolve().parents[1]
    print(json.dumps([str(checkout), *calls]), flush=True)
    for line in sys.stdin:
        name = line.strip()
        started = time.perf_counter()
        for _ in range(repeats[name]):
            calls[name]()
        print((time.perf_counter() - started) / repeats[name] * 1e6, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
