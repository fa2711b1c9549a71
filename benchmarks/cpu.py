"""The CPU kernels beside eager torch, torch.compile and a copy of the same memory, as the README's table.

    python -m benchmarks.run cpu            # a few minutes
    python -m benchmarks.run cpu 64x10      # one shape

Every shape runs in a process of its own, twice: with the C library's default allocation, as users run it, and with
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised, which is eager torch at its best. Rounds alternate between
the candidates and medians are reported; a shape is timed only after its gradient and counts agreed with eager's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record
from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats

SHAPES = ("64x10", "512x10", "2048x1000", "1024x8192", "512x32000", "1024x50257", "256x128256", "bf16:1024x4096")
GRADS = ("grads:12x1000", "grads:60x20000", "grads:200x1000", "grads:150x680000")
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
Calls = dict[str, Callable[[], Any]]


def loss_calls(shape: str) -> Calls:
    """The candidates of one shape of logits, checked."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    n, v = map(int, shape.removeprefix("bf16:").split("x"))
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, v, generator=generator) * 3).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    leaf, out, inplace = logits.clone().requires_grad_(), torch.empty_like(logits), logits.clone()
    total, correct, meter = torch.zeros(()), torch.zeros((), dtype=torch.int64), Meter("cpu")

    def plain(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(x, targets)
        total.add_(loss.detach())
        correct.add_(x.argmax(-1).eq(targets).sum())
        return loss

    compiled = torch.compile(plain)

    def train(loss: Callable[..., torch.Tensor], **options: Any) -> None:
        leaf.grad = None
        loss(leaf, **options).backward()

    def evaluate() -> None:
        with torch.no_grad():
            cross_entropy(logits, targets, meter=meter)

    train(plain)
    grad = cross_entropy_step(logits, targets, meter, out=out)
    assert leaf.grad is not None
    error = (grad.float() - leaf.grad.float()).norm() / leaf.grad.float().norm()
    if not error < (1e-5 if dtype == torch.float32 else 1e-2) or meter.compute().correct[1] != correct:
        raise SystemExit(f"{shape}: the gradient or the counts differ from eager's (error {error:.2g}); not timed")
    avx2 = KernelConfig(instruction_set="avx2")
    return {
        "eager": lambda: train(plain),
        "compile": lambda: train(compiled),
        "out": lambda: cross_entropy_step(logits, targets, meter, out=out),
        "inplace": lambda: cross_entropy_step(inplace, targets, meter, inplace=True),
        "autograd": lambda: train(lambda x: cross_entropy(x, targets, meter=meter)),
        "loss only": evaluate,
        "avx2": lambda: cross_entropy_step(logits, targets, meter, out=out, config=avx2),
        "copy_": lambda: out.copy_(logits),
        "mul_": lambda: inplace.mul_(1.0),
        "read": lambda: logits.amax(),
    }


def grad_calls(shape: str) -> Calls:
    """The candidates of one list of gradients, checked."""
    tensors, size = map(int, shape.removeprefix("grads:").split("x"))
    grads = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(tensors)]
    stats = grad_stats(grads)
    truth = torch.stack(torch._foreach_norm([g.double() for g in grads]))
    if not torch.allclose(stats.norms, truth, rtol=1e-12, atol=0):
        raise SystemExit(f"{shape}: the norms differ from float64's; not timed")
    return {
        "grad_stats": lambda: grad_stats(grads, out=stats),
        "foreach_norm": lambda: torch._foreach_norm(grads),
        "read": lambda: [g.amax() for g in grads],
    }


def measure(shape: str) -> dict[str, Any]:
    """Median microseconds of each candidate; `busy` where the machine was not ours."""
    calls = grad_calls(shape) if shape.startswith("grads:") else loss_calls(shape)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            started = time.perf_counter()
            call()
        repeats[name] = max(1, round(0.02 / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor, wall = time.process_time(), time.perf_counter()
    for _ in range(15):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - started) / repeats[name] * 1e6)
    threads = (time.process_time() - processor) / (time.perf_counter() - wall)
    spread = {name: (median(t) - min(t)) / min(t) for name, t in times.items()}
    busy = os.getloadavg()[0] > 1.5 * torch.get_num_threads() or median(spread.values()) > 0.3
    figures = {name: round(median(t), 2) for name, t in times.items()}
    return {"shape": shape, "microseconds": figures, "threads_used": round(threads, 2), "busy": busy}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how many times faster than the rivals, and times as slow as moving the memory."""
    head = ("eager, default", "eager, tuned", "torch.compile", "out / copy_", "in place / mul_", "autograd, default")
    head = (*head, "loss only / read", "avx2 / best")
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        t, best = row["default"]["microseconds"], row["tuned"]["microseconds"]
        mark = " (busy)" if row["default"]["busy"] or row["tuned"]["busy"] else ""
        if "grad_stats" in t:
            ratios = (
                f"{t['foreach_norm'] / t['grad_stats']:.1f}x of _foreach_norm, {t['grad_stats'] / t['read']:.2f} read"
            )
            lines.append(f"| {row['shape']}{mark} | {ratios} |" + " |" * (len(head) - 1))
            continue
        cells = [t["eager"] / t["out"], best["eager"] / best["out"], t["compile"] / t["out"], t["out"] / t["copy_"]]
        cells += [
            t["inplace"] / t["mul_"],
            t["eager"] / t["autograd"],
            t["loss only"] / t["read"],
            t["avx2"] / t["out"],
        ]
        units = ("x", "x", "x", "", "", "x", "", "")
        texts = [f"{cell:.3g}{unit}" for cell, unit in zip(cells, units, strict=True)]
        lines.append(f"| {row['shape']}{mark} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main(shapes: list[str]) -> None:
    """Measure each shape in fresh processes, print the table, write the figures."""
    rows = []
    for shape in shapes or [*SHAPES, *GRADS]:
        row: dict[str, Any] = {"shape": shape}
        for name, extra in (("default", {}), ("tuned", TUNED)):
            command = [sys.executable, "-m", "benchmarks.cpu", "--measure", shape]
            done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            row[name] = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\n\n{record.write('cpu', rows)}")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2])))
