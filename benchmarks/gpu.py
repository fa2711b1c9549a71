"""The GPU kernels beside eager torch, torch.compile, other libraries' kernels and a copy.

    python -m benchmarks gpu    # everything, on a machine with a CUDA device
    python -m benchmarks gpu bf16:8192x128256 grads:fp32:160x160000

One step on logits [N, V] is loss, correct count, accumulation and logits gradient. It has to read
and write N * V numbers once; GB/s counts these, and the share is that of the bandwidth of a large
copy. Gradients have to be read once. A candidate of ours is timed only after it agrees with eager
torch. The table names the rivals that are not installed, and gives the error of a candidate that
fails. The figures are written after every shape.

Small inputs are copied and taken in turn, so that every call reads from memory and not from the L2
cache. "ms" is the time of a call between two events. For a short call that is the host's time, so
"replayed" gives the time of the same calls in a CUDA graph.

Goals: one launch and no host sync per step; at least 85 % of the copy's bandwidth from 1,000
classes up; faster than every rival at every shape; gradient statistics no slower than
`torch._foreach_norm` alone.

Long file: it is carried to GPU machines as one program.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.gpu_timing import (
    ROUNDS,
    copy_bandwidth,
    device_milliseconds,
    host_microseconds,
    launches,
    replayed_milliseconds,
    syncs,
)
from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats
from esper_kernels.backends import refusal

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CLASSES = (10, 100, 1000, 8192, 32000, 50257, 128256, 262144)
GRADS = (
    "grads:fp32:60x20000",
    "grads:fp32:160x160000",
    "grads:bf16:2000x1000",
    "grads:bf16:300x4000000",
)
BACKENDS = ("triton", "cuda")
LARGEST = 2**31  # bytes of logits, so that eager torch's several copies fit
MOST_COPIES = 256  # copies of the inputs of a small shape
MOST_CAPTURED = 200  # calls in one graph


class Shape(NamedTuple):
    grads: bool
    dtype: torch.dtype
    rows: int  # for gradients: the number of tensors
    columns: int  # classes; for gradients: elements per tensor

    @property
    def bytes(self) -> int:
        """Bytes that have to be read once."""
        return self.rows * self.columns * self.dtype.itemsize


def shapes() -> list[str]:
    """All shapes: 8192 rows, but more if these are tiny, and fewer if they do not fit."""
    logits = []
    for name in ("bf16", "fp32"):
        for v in CLASSES:
            rows = (
                65536
                if v <= 100
                else min(8192, LARGEST // (v * DTYPES[name].itemsize) // 1024 * 1024)
            )
            logits.append(f"{name}:{rows}x{v}")
    return [*logits, *GRADS]


def parse(text: str) -> Shape:
    """Read "bf16:8192x1000" or "grads:fp32:60x20000"; ValueError for anything else."""
    found = re.fullmatch(r"(grads:)?(\w+):([1-9]\d*)x([1-9]\d*)", text)
    if found is None or found[2] not in DTYPES:
        raise ValueError(
            f"a shape is {'|'.join(DTYPES)}:ROWSxCLASSES or grads:DTYPE:TENSORSxSIZE, got {text!r}"
        )
    return Shape(found[1] is not None, DTYPES[found[2]], int(found[3]), int(found[4]))


def served(op: str, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Our backends that can run here, and why the others cannot."""
    reasons = {name: refusal(op, name, "cuda", dtype) for name in BACKENDS}
    return [name for name, why in reasons.items() if why is None], {
        name: why for name, why in reasons.items() if why
    }


def rival(module: str, name: str) -> Callable[..., Any] | None:
    """A function of another library, or None if that is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


class Batch(NamedTuple):
    """The memory of one step."""

    logits: torch.Tensor
    targets: torch.Tensor
    leaf: torch.Tensor  # a copy of the logits that requires grad
    out: torch.Tensor


@dataclass
class Subject:
    """The measurements at one shape."""

    inputs: list[Any]  # of one shape, taken in turn
    candidates: dict[str, Callable[[Any], Any]]
    check: Callable[[str], None] = lambda name: None
    """Raises AssertionError if the candidate of this name does not agree with eager torch."""
    missing: dict[str, str] = field(default_factory=dict)  # why a candidate cannot be measured here


def copies(size: int, cache: int) -> int:
    """The number of inputs of `size` bytes that must take turns so that none is still in a cache of
    `cache` bytes."""
    return 1 if size > 2 * cache else min(MOST_COPIES, 1 + -(-2 * cache // size))


def cache_bytes() -> int:
    """The size of the current device's L2 cache, in bytes."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def train(loss: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor | None:
    """A forward and backward pass; returns the gradient."""
    batch.leaf.grad = None
    loss(batch).backward()
    return batch.leaf.grad


def batches(shape: Shape) -> list[Batch]:
    """Random inputs, so many that they do not stay in the cache."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for _ in range(copies(shape.bytes, cache_bytes())):
        logits = torch.randn(
            shape.rows, shape.columns, generator=generator, device="cuda", dtype=shape.dtype
        )
        targets = torch.randint(shape.columns, (shape.rows,), generator=generator, device="cuda")
        made.append(
            Batch(logits, targets, logits.clone().requires_grad_(), torch.empty_like(logits))
        )
    return made


def loss_subject(shape: Shape) -> Subject:
    """The candidates for one shape of logits."""
    inputs = batches(shape)
    total = torch.zeros((), device="cuda")
    correct = torch.zeros((), dtype=torch.int64, device="cuda")

    def plain(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(x, targets)
        total.add_(loss.detach())
        correct.add_(x.argmax(-1).eq(targets).sum())
        return loss

    def step(batch: Batch, config: KernelConfig, meter: Meter) -> torch.Tensor:
        return cross_entropy_step(batch.logits, batch.targets, meter, out=batch.out, config=config)

    def autograd(batch: Batch, config: KernelConfig, meter: Meter) -> torch.Tensor | None:
        return train(lambda b: cross_entropy(b.leaf, b.targets, meter=meter, config=config), batch)

    compiled = torch.compile(plain, dynamic=False)
    candidates: dict[str, Callable[[Batch], Any]] = {
        "eager": partial(train, lambda b: plain(b.leaf, b.targets)),
        "compile": partial(train, lambda b: compiled(b.leaf, b.targets)),
    }
    expected = train(lambda b: plain(b.leaf, b.targets), inputs[0])
    assert expected is not None
    expected = expected.float()
    expected_correct = int(correct)
    bound = 1e-5 if shape.dtype == torch.float32 else 1e-2
    names, missing = served("cross_entropy", shape.dtype)
    meters = {}
    for name in names:
        for label, function in ((name, step), (f"{name}, autograd", autograd)):
            meters[label] = Meter("cuda")
            candidates[label] = partial(
                function, config=KernelConfig(backend=name), meter=meters[label]
            )

    def check(name: str) -> None:
        if name not in meters:
            return
        meters[name].reset()
        gradient = candidates[name](inputs[0]).float()
        error = float((gradient - expected).norm() / expected.norm())
        counted = meters[name].compute().correct[1]
        assert error < bound, f"the gradient differs from eager's by {error:.2g}, relative in L2"
        assert counted == expected_correct, (
            f"counts {counted} correct rows, eager {expected_correct}"
        )

    rivals, absent = loss_rivals(inputs)
    candidates |= rivals
    candidates["copy_"] = lambda batch: batch.out.copy_(batch.logits)
    return Subject(inputs, candidates, check, missing | absent)


def loss_rivals(inputs: list[Batch]) -> tuple[dict[str, Callable[[Batch], Any]], dict[str, str]]:
    """Other libraries' kernels, and those that are not installed."""
    liger = rival("liger_kernel.transformers.functional", "liger_cross_entropy")
    quack = rival("quack.cross_entropy", "cross_entropy")
    quack_one_pass = rival("quack.cross_entropy", "cross_entropy_fwd")
    candidates: dict[str, Callable[[Batch], Any]] = {}
    if liger is not None:  # writes its gradient over the logits, so it gets its own copy
        own = {id(batch.logits): batch.logits.clone().requires_grad_() for batch in inputs}

        def liger_step(batch: Batch) -> None:
            leaf = own[id(batch.logits)]
            leaf.grad = None
            liger(leaf, batch.targets, return_token_accuracy=True).loss.backward()

        candidates["liger"] = liger_step
    if quack is not None:  # neither form counts correct rows
        candidates["quack, autograd, loss only"] = partial(
            train, lambda b: quack(b.leaf, b.targets)
        )
    if quack_one_pass is not None:
        candidates["quack, one pass, loss only"] = lambda b: quack_one_pass(
            b.logits, b.targets, return_dx=True
        )
    found = {"liger": liger, "quack": quack or quack_one_pass}
    return candidates, {
        name: "not installed" for name, function in found.items() if function is None
    }


def grad_subject(shape: Shape) -> Subject:
    """The candidates for one list of gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = []
    for _ in range(copies(shape.bytes, cache_bytes())):
        everything = torch.randn(
            shape.rows, shape.columns, generator=generator, device="cuda", dtype=shape.dtype
        )
        inputs.append([row.clone() for row in everything])
        del everything
    truth = torch.stack([grad.double().norm() for grad in inputs[0]])
    names, missing = served("grad_stats", shape.dtype)
    stats = {name: grad_stats(inputs[0], config=KernelConfig(backend="eager")) for name in names}
    candidates: dict[str, Callable[[Any], Any]] = {
        "foreach_norm": torch._foreach_norm,
        "get_total_norm": torch.nn.utils.get_total_norm,
    }
    for name in names:
        candidates[name] = partial(grad_stats, out=stats[name], config=KernelConfig(backend=name))

    def check(name: str) -> None:
        if name in stats:
            candidates[name](inputs[0])
            assert torch.allclose(stats[name].norms, truth, rtol=1e-12, atol=0), (
                "the norms differ from float64's"
            )

    return Subject(inputs, candidates, check, missing)


def measure(text: str, copied: float) -> dict[str, Any]:
    """Medians of alternating rounds for every candidate of one shape. `copied`: from
    `copy_bandwidth`."""
    shape = parse(text)
    torch._dynamo.reset()
    subject = grad_subject(shape) if shape.grads else loss_subject(shape)
    errors: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        """The result of a candidate's work, or None and its error."""
        if name in errors:
            return None
        try:
            return work()
        # another library may raise anything; the other candidates are still measured
        except Exception as error:
            errors[name] = described(error)
            return None

    def prepare(name: str) -> int:
        subject.check(name)
        call = subject.candidates[name]
        for batch in subject.inputs[:3]:
            call(batch)
        return max(1, round(5 / device_milliseconds(call, subject.inputs, 3)))

    repeats = {name: attempt(name, partial(prepare, name)) for name in subject.candidates}
    times: dict[str, list[float]] = {name: [] for name in subject.candidates}
    for _ in range(ROUNDS):
        for name, call in subject.candidates.items():
            taken = attempt(name, partial(device_milliseconds, call, subject.inputs, repeats[name]))
            times[name] += [] if taken is None else [taken]
    moved = shape.bytes if shape.grads else 2 * shape.bytes
    rows = {}
    for name, call in subject.candidates.items():
        figures = attempt(
            name, lambda n=name, c=call: facts(c, subject.inputs, median(times[n]), moved, copied)
        )
        rows[name] = figures or {"error": errors[name]}
    # last, because a failed capture may affect what follows
    for name, call in subject.candidates.items():
        if name not in errors:
            number = min(MOST_CAPTURED, repeats[name])
            replayed = attempt(name, partial(replayed_milliseconds, call, subject.inputs, number))
            rows[name]["replayed_milliseconds"] = (
                errors[name] if replayed is None else round(replayed, 5)
            )
    return {
        "shape": text,
        "inputs": len(subject.inputs),
        "candidates": rows,
        "missing": subject.missing,
    }


def facts(
    call: Callable[[Any], Any], inputs: list[Any], milliseconds: float, moved: int, copied: float
) -> dict[str, Any]:
    """The figures of one candidate, from its time and the bytes that it has to move."""
    return {
        "milliseconds": round(milliseconds, 5),
        "gb_per_s": round(moved / milliseconds / 1e6, 1),
        "share_of_copy": round(moved / milliseconds * 1e3 / copied, 3),
        "launches": launches(lambda: call(inputs[0])),
        "syncs": syncs(lambda: call(inputs[0])),
        "host_microseconds": round(median(host_microseconds(call, inputs) for _ in range(5)), 1),
    }


def described(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


COLUMNS = {
    "milliseconds": "ms",
    "replayed_milliseconds": "ms replayed",
    "gb_per_s": "GB/s",
    "share_of_copy": "share of a copy",
    "launches": "launches",
    "syncs": "syncs",
    "host_microseconds": "host us",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for every shape and candidate."""
    head = ("shape", "candidate", *COLUMNS.values())
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        reasons = dict(row["missing"])
        for name, figures in row["candidates"].items():
            if "error" in figures:
                reasons[name] = figures["error"]
                continue
            cells = [figures[column] for column in COLUMNS]
            shown = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
            lines.append("| " + " | ".join((row["shape"], name, *shown)) + " |")
        for name, why in reasons.items():
            lines.append(f"| {row['shape']} | {name} | {why} |" + " |" * (len(COLUMNS) - 1))
    return "\n".join(lines)


def measure_all(names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Measure every shape, print its rows, and write all figures so far into `folder`."""
    copied = copy_bandwidth()
    rows = []
    for name in names:
        try:
            rows.append(measure(name, copied))
        except Exception as error:  # such as out of memory; the other shapes are still measured
            rows.append({"shape": name, "candidates": {}, "missing": {"all": described(error)}})
        print("\n".join(table(rows[-1:]).splitlines()[2:]), flush=True)
        record.write("gpu", {"copy_gb_per_s": round(copied / 1e9, 1), "rows": rows}, folder)
        torch.cuda.empty_cache()
    return rows


def main(names: list[str], folder: Path = record.RESULTS) -> None:
    """Measure, print the table, and write the figures into `folder`."""
    try:
        for name in names:
            parse(name)
    except ValueError as error:
        sys.exit(str(error))
    if not torch.cuda.is_available():
        sys.exit("the benchmark `gpu` needs a CUDA device, and torch finds none here")
    print(f"\n{table(measure_all(names or shapes(), folder))}\n\n{folder / 'gpu.json'}")


if __name__ == "__main__":
    arguments = record.parser("gpu", __doc__)
    arguments.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help="DTYPE:ROWSxCLASSES or grads:DTYPE:TENSORSxSIZE"
    )
    main(arguments.parse_args().shapes)
