"""The CPU kernels beside eager torch, torch.compile and a copy of the same memory.

    python -m benchmarks cpu            # every shape, a few minutes
    python -m benchmarks cpu 64x10      # one shape
    python -m benchmarks cpu 64x10 grads:12x1000

Every shape is measured twice, each time in a new process: with the C library's default
allocation, which is what users get, and with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_
raised, which is eager torch at its best. Rounds alternate between the candidates, and medians are
reported. A shape is timed only after its gradient and counts agree with eager torch's. Then the
instructions per logit are printed, as `python -m benchmarks instructions` does. Figures of all
shapes together are written to results/cpu-PROCESSOR.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import instructions, record, timing
from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats

SHAPES = (
    "64x10",
    "512x10",
    "2048x1000",
    "1024x8192",
    "512x32000",
    "1024x50257",
    "256x128256",
    "bf16:1024x4096",
)
GRADS = ("grads:12x1000", "grads:60x20000", "grads:200x1000", "grads:150x680000")
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
Calls = dict[str, Callable[[], Any]]


def loss_calls(shape: str) -> Calls:
    """The candidates for one shape of logits, after their results were checked."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    n, v = map(int, shape.removeprefix("bf16:").split("x"))
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, v, generator=generator) * 3).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    leaf = logits.clone().requires_grad_()
    out = torch.empty_like(logits)
    inplace = logits.clone()
    total = torch.zeros(())
    correct = torch.zeros((), dtype=torch.int64)
    meter = Meter("cpu")

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
    if (
        not error < (1e-5 if dtype == torch.float32 else 1e-2)
        or meter.compute().correct[1] != correct
    ):
        raise SystemExit(
            f"{shape} is not timed: gradient or counts differ from eager torch's (error "
            f"{error:.2g})"
        )
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
    """The candidates for one list of gradients, after their results were checked."""
    tensors, size = map(int, shape.removeprefix("grads:").split("x"))
    grads = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(tensors)]
    stats = grad_stats(grads)
    truth = torch.stack(torch._foreach_norm([g.double() for g in grads]))
    if not torch.allclose(stats.norms, truth, rtol=1e-12, atol=0):
        raise SystemExit(f"{shape} is not timed: the norms differ from those in float64")
    return {
        "grad_stats": lambda: grad_stats(grads, out=stats),
        "foreach_norm": lambda: torch._foreach_norm(grads),
        "read": lambda: [g.amax() for g in grads],
    }


def measure(shape: str) -> dict[str, Any]:
    """Median microseconds of each candidate; `busy` if something else used the machine."""
    calls = grad_calls(shape) if shape.startswith("grads:") else loss_calls(shape)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            started = time.perf_counter()
            call()
        repeats[name] = max(1, round(0.02 / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    others = timing.Others()
    processor = time.process_time()
    wall = time.perf_counter()
    for _ in range(15):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - started) / repeats[name] * 1e6)
    threads = (time.process_time() - processor) / (time.perf_counter() - wall)
    spread = {name: (median(t) - min(t)) / min(t) for name, t in times.items()}
    busy = others.are_busy() or median(spread.values()) > 0.3
    figures = {name: round(median(t), 2) for name, t in times.items()}
    return {
        "shape": shape,
        "microseconds": figures,
        "threads_used": round(threads, 2),
        "busy": busy,
    }


Times = dict[str, float]
COLUMNS: dict[str, Callable[[Times, Times], str]] = {
    "faster than eager": lambda t, tuned: f"{t['eager'] / t['out']:.3g}x",
    "than tuned eager": lambda t, tuned: f"{tuned['eager'] / tuned['out']:.3g}x",
    "than `torch.compile`": lambda t, tuned: f"{t['compile'] / t['out']:.3g}x",
    "time / `copy_`": lambda t, tuned: f"{t['out'] / t['copy_']:.3g}",
    "in place / `mul_`": lambda t, tuned: f"{t['inplace'] / t['mul_']:.3g}",
    "autograd form faster than eager": lambda t, tuned: f"{t['eager'] / t['autograd']:.3g}x",
    "loss only / one read": lambda t, tuned: f"{t['loss only'] / t['read']:.3g}",
    "AVX2 / best": lambda t, tuned: f"{t['avx2'] / t['out']:.3g}",
}
"""The columns of the table, from the microseconds with default and with tuned allocation."""
SHORT = tuple(COLUMNS)[:5]
SHORT_SHAPES = ("64x10", "2048x1000", "512x32000", "256x128256", "bf16:1024x4096")
GRAD_COLUMNS: dict[str, Callable[[Times], str]] = {
    "microseconds": lambda t: record.short(t["grad_stats"]),
    "faster than `_foreach_norm`": lambda t: f"{t['foreach_norm'] / t['grad_stats']:.2g}x",
    "time / one read": lambda t: f"{t['grad_stats'] / t['read']:.2g}",
}


def table(rows: list[dict[str, Any]], columns: Iterable[str] = tuple(COLUMNS)) -> str:
    """Markdown: how a step on logits of each shape compares."""
    lines = [["logits", *columns]]
    for row in rows:
        if not is_gradients(row):
            times = [row[name]["microseconds"] for name in ("default", "tuned")]
            lines.append([label(row), *(COLUMNS[column](*times) for column in columns)])
    return record.markdown(lines)


def grad_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how `grad_stats` compares on each list of gradients."""
    lines = [["gradients", *GRAD_COLUMNS]]
    for row in rows:
        if is_gradients(row):
            times = row["default"]["microseconds"]
            lines.append([label(row), *(column(times) for column in GRAD_COLUMNS.values())])
    return record.markdown(lines)


def short_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: some columns and some shapes, for README.md."""
    return table([row for row in rows if row["shape"] in SHORT_SHAPES], SHORT)


def is_gradients(row: dict[str, Any]) -> bool:
    return str(row["shape"]).startswith("grads:")


def label(row: dict[str, Any]) -> str:
    """The shape in words, marked if something else used the machine."""
    text = (
        str(row["shape"]).removeprefix("grads:").replace("bf16:", "bfloat16 ").replace("x", " x ")
    )
    busy = row["default"]["busy"] or row["tuned"]["busy"]
    return f"{text} (busy)" if busy else text


def in_new_process(shape: str, variables: dict[str, str]) -> dict[str, Any]:
    """`measure` of one shape in a process with these environment variables."""
    command = [sys.executable, "-m", "benchmarks", "cpu", "--measure", shape]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure each shape in new processes, print the tables, and write the figures."""
    parser = record.parser("cpu", __doc__)
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help="[bf16:]ROWSxCLASSES or grads:TENSORSxSIZE"
    )
    parser.add_argument(
        "--measure", metavar="SHAPE", help="measure one shape in this process and print JSON"
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rows = []
    for shape in options.shapes or [*SHAPES, *GRADS]:
        default = in_new_process(shape, {})
        tuned = in_new_process(shape, TUNED)
        rows.append({"shape": shape, "default": default, "tuned": tuned})
        show = grad_table if is_gradients(rows[-1]) else table
        print(show(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\n\n{grad_table(rows)}")
    if not options.shapes:
        print(f"\n{instructions.table(instructions.measure())}")
        print(f"\n{record.write(f'cpu-{record.machine_name()}', rows)}")


if __name__ == "__main__":
    main()
