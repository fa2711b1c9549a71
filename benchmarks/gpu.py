"""The GPU kernels beside eager torch, torch.compile, other libraries' kernels and a copy of the same memory.

    python -m benchmarks gpu                                  # everything, on a machine with a CUDA device
    python -m benchmarks gpu bf16:8192x128256 grads:fp32:160x160000

Logits: one step is loss, correct count, accumulation and logits gradient. It has to read N V numbers and write as many:
the bandwidth given is of those, and the share is of the bandwidth of a large copy. Gradients have to be read once.
Rivals that are not installed are named so. A candidate of ours is timed only after it agreed with eager torch.

Goals: one launch and no host sync a step; at least 85 % of the copy's bandwidth from 1,000 classes up; faster than
every rival at every shape; gradient statistics no slower than `torch._foreach_norm` alone.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import record
from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats
from esper_kernels.backends import refusal

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CLASSES = (10, 100, 1000, 8192, 32000, 50257, 128256, 262144)
GRADS = ("grads:fp32:60x20000", "grads:fp32:160x160000", "grads:bf16:2000x1000", "grads:bf16:300x4000000")
BACKENDS = ("triton", "cuda")
LARGEST = 2**31  # bytes of logits, so that eager torch's several copies fit
ROUNDS = 15
Calls = dict[str, Callable[[], Any]]


class Shape(NamedTuple):
    grads: bool
    dtype: torch.dtype
    rows: int  # or tensors
    columns: int  # classes, or elements a tensor

    @property
    def bytes(self) -> int:
        """What has to be read once."""
        return self.rows * self.columns * self.dtype.itemsize


def shapes() -> list[str]:
    """All that are measured: 8192 rows, or more or fewer where these are tiny or would not fit."""
    logits = []
    for name in ("bf16", "fp32"):
        for v in CLASSES:
            rows = 65536 if v <= 100 else min(8192, LARGEST // (v * DTYPES[name].itemsize) // 1024 * 1024)
            logits.append(f"{name}:{rows}x{v}")
    return [*logits, *GRADS]


def parse(text: str) -> Shape:
    """Read "bf16:8192x1000" or "grads:fp32:60x20000"; ValueError for anything else."""
    found = re.fullmatch(r"(grads:)?(\w+):([1-9]\d*)x([1-9]\d*)", text)
    if found is None or found[2] not in DTYPES:
        raise ValueError(f"a shape is {'|'.join(DTYPES)}:ROWSxCLASSES or grads:DTYPE:TENSORSxSIZE, got {text!r}")
    return Shape(found[1] is not None, DTYPES[found[2]], int(found[3]), int(found[4]))


def served(op: str, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Our backends that can run here, and why the others cannot."""
    reasons = {name: refusal(op, name, "cuda", dtype) for name in BACKENDS}
    return [name for name, why in reasons.items() if why is None], {name: why for name, why in reasons.items() if why}


def rival(module: str, name: str) -> Callable[..., Any] | None:
    """A function of another library, or None where that is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def loss_calls(shape: Shape) -> tuple[Calls, dict[str, str]]:
    """The candidates of one shape of logits, ours checked, and those that are missing."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(shape.rows, shape.columns, generator=generator, device="cuda", dtype=shape.dtype)
    targets = torch.randint(shape.columns, (shape.rows,), generator=generator, device="cuda")
    leaf, out = logits.clone().requires_grad_(), torch.empty_like(logits)
    total, correct = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")

    def plain(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(x, targets)
        total.add_(loss.detach())
        correct.add_(x.argmax(-1).eq(targets).sum())
        return loss

    def train(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        leaf.grad = None
        loss(leaf).backward()

    compiled = torch.compile(plain, dynamic=False)
    train(plain)
    assert leaf.grad is not None
    calls: Calls = {"eager": lambda: train(plain), "compile": lambda: train(compiled)}
    names, missing = served("cross_entropy", shape.dtype)
    expected, bound = leaf.grad.clone(), 1e-5 if shape.dtype == torch.float32 else 1e-2
    for name in names:
        config, meter = KernelConfig(backend=name), Meter("cuda")
        grad = cross_entropy_step(logits, targets, meter, out=out, config=config)
        error = float((grad.float() - expected.float()).norm() / expected.float().norm())
        if not error < bound or meter.compute().correct[1] != int(correct):
            raise SystemExit(f"{name}, {shape}: gradient or count differ from eager's (error {error:.2g}); not timed")
        calls[name] = lambda c=config, m=meter: cross_entropy_step(logits, targets, m, out=out, config=c)
        calls[f"{name}, autograd"] = lambda c=config, m=meter: train(
            lambda x: cross_entropy(x, targets, meter=m, config=c)
        )
    liger = rival("liger_kernel.transformers.functional", "liger_cross_entropy")
    quack = rival("quack.cross_entropy", "cross_entropy")
    if liger is not None:  # writes its gradient over the logits, so it gets some of its own
        its = logits.clone().requires_grad_()

        def liger_step() -> None:
            its.grad = None
            liger(its, targets, return_token_accuracy=True).loss.backward()

        calls["liger"] = liger_step
    if quack is not None:  # has no accuracy
        calls["quack, loss only"] = lambda: train(lambda x: quack(x, targets))
    missing |= {name: "not installed" for name, found in (("liger", liger), ("quack", quack)) if found is None}
    return {**calls, "copy_": lambda: out.copy_(logits)}, missing


def grad_calls(shape: Shape) -> tuple[Calls, dict[str, str]]:
    """The candidates of one list of gradients, ours checked, and those that are missing."""
    generator = torch.Generator("cuda").manual_seed(0)
    everything = torch.randn(shape.rows, shape.columns, generator=generator, device="cuda", dtype=shape.dtype)
    grads = [row.clone() for row in everything]
    del everything
    truth = torch.stack([g.double().norm() for g in grads])
    calls: Calls = {
        "foreach_norm": lambda: torch._foreach_norm(grads),
        "get_total_norm": lambda: torch.nn.utils.get_total_norm(grads),
    }
    names, missing = served("grad_stats", shape.dtype)
    for name in names:
        config = KernelConfig(backend=name)
        stats = grad_stats(grads, config=config)
        if not torch.allclose(stats.norms, truth, rtol=1e-12, atol=0):
            raise SystemExit(f"{name}, {shape}: the norms differ from float64's; not timed")
        calls[name] = lambda c=config, s=stats: grad_stats(grads, out=s, config=c)
    return calls, missing


def device_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call between two events of the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def host_microseconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Time the host is busy with one call, while the device still works on the earlier ones."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats * 1e6


def syncs(call: Callable[[], Any]) -> int:
    """How often one call makes the host wait, as torch itself reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def launches(call: Callable[[], Any]) -> int:
    """Kernels that one call starts on the device, copies and fills of memory not counted."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median(device_milliseconds(lambda: target.copy_(source), 5) for _ in range(ROUNDS)) * 1e3


def measure(text: str, copied: float) -> dict[str, Any]:
    """Medians of alternating rounds for every candidate of one shape. `copied`: of `copy_bandwidth`."""
    shape = parse(text)
    torch._dynamo.reset()
    calls, missing = grad_calls(shape) if shape.grads else loss_calls(shape)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(1, round(5 / device_milliseconds(call, 3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(device_milliseconds(call, repeats[name]))
    moved = shape.bytes if shape.grads else 2 * shape.bytes
    rows = {}
    for name, call in calls.items():
        milliseconds = median(times[name])
        rows[name] = {
            "milliseconds": round(milliseconds, 5),
            "gb_per_s": round(moved / milliseconds / 1e6, 1),
            "share_of_copy": round(moved / milliseconds * 1e3 / copied, 3),
            "launches": launches(call),
            "syncs": syncs(call),
            "host_microseconds": round(median(host_microseconds(call) for _ in range(5)), 1),
        }
    return {"shape": text, "candidates": rows, "missing": missing}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a shape and candidate."""
    head = ("shape", "candidate", "ms", "GB/s", "share of a copy", "launches", "syncs", "host us")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        for name, figures in row["candidates"].items():
            lines.append(
                "| " + " | ".join((row["shape"], name, *(f"{figure:.4g}" for figure in figures.values()))) + " |"
            )
        lines += [f"| {row['shape']} | {name} | {why} |" + " |" * 5 for name, why in row["missing"].items()]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Measure, print the table, write the figures."""
    try:
        for name in names:
            parse(name)
    except ValueError as error:
        sys.exit(str(error))
    if not torch.cuda.is_available():
        sys.exit("the benchmark `gpu` needs a CUDA device, and torch finds none here")
    copied, rows = copy_bandwidth(), []
    for name in names or shapes():
        rows.append(measure(name, copied))
        print("\n".join(table(rows[-1:]).splitlines()[2:]), flush=True)
        torch.cuda.empty_cache()
    print(f"\n{table(rows)}\n\n{record.write('gpu', {'copy_gb_per_s': round(copied / 1e9, 1), 'rows': rows})}")


if __name__ == "__main__":
    main(sys.argv[1:])
