"""Linear cross entropy beside torch's own forms of it.

    python -m benchmarks linear                     # every shape, under ten minutes on two cores
    python -m benchmarks linear 2048x384x50257      # one shape: tokens x hidden x classes
    python -m benchmarks linear bf16:1024x384x50257

Time and peak memory of loss, correct count and the gradients of hidden and weight. Candidates
alternate in one process, and medians are reported; memory is that of one call in a process of its
own. Nothing is timed before gradients and counts were checked: against float64, on a few tokens of
the same width and classes. Figures of all shapes together are written to results/linear.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record, timing
from esper_kernels import Meter, linear_cross_entropy, linear_cross_entropy_step
from esper_kernels.testing import relative_error

SHAPES = (
    "2048x384x50257",
    "8192x384x50257",
    "1024x1024x50257",
    "1024x384x128256",
    "1024x1024x128256",
    "bf16:512x384x50257",
)
PLAIN = "linear, F.cross_entropy, argmax"
TORCH = "F.linear_cross_entropy, argmax left out"
LIGER = "Liger"
STEP = "linear_cross_entropy_step"
LOSS = "linear_cross_entropy"
ROUNDS = 5
SECONDS = 30.0
"""After which no further round of a shape begins."""
CHECKED_TOKENS = 64


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    meter: Meter

    def clear(self) -> None:
        """Hidden states have no gradient in a new step; that of a parameter is zero, and its memory
        is in use already."""
        self.hidden.grad = None
        self.weight.grad = torch.ones_like(self.weight).zero_()


def case(shape: str, tokens: int | None = None) -> Case:
    """The inputs of a shape, or fewer tokens of them."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, h, v = map(int, shape.removeprefix("bf16:").split("x"))
    n = tokens or n
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).to(device, dtype)
    weight = (torch.randn(v, h, generator=generator) * h**-0.5).to(device, dtype)
    targets = torch.randint(v, (n,), generator=generator).to(device)
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, Meter(device))


def plain(x: Case) -> Tensor:
    logits = F.linear(x.hidden, x.weight)
    loss = F.cross_entropy(logits, x.targets)
    correct = (logits.argmax(-1) == x.targets).sum()
    del logits
    loss.backward()
    return correct


def by_torch(x: Case) -> None:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    loss = F.linear_cross_entropy(  # type: ignore[attr-defined]
        x.hidden, x.weight, x.targets, options=options
    )
    loss.backward()


def by_liger(x: Case) -> None:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    liger_fused_linear_cross_entropy(x.hidden, x.weight, x.targets).backward()


def by_step(x: Case) -> None:
    gradients = linear_cross_entropy_step(
        x.hidden, x.weight, x.targets, x.meter, weight_grad=x.weight.grad
    )
    x.hidden.grad = gradients.hidden


def by_loss(x: Case) -> None:
    linear_cross_entropy(x.hidden, x.weight, x.targets, meter=x.meter).backward()


def candidates() -> dict[str, Callable[[Case], Any]]:
    """The candidates that run on this machine."""
    found: dict[str, Callable[[Case], Any]] = {PLAIN: plain}
    if hasattr(F, "linear_cross_entropy"):
        found[TORCH] = by_torch
    if torch.cuda.is_available():
        try:
            import liger_kernel  # noqa: F401

            found[LIGER] = by_liger
        except ImportError:
            pass  # it is not a dependency of ours
    return {**found, STEP: by_step, LOSS: by_loss}


def check(shape: str) -> float:
    """The largest error of our gradients over that of plain torch, both against float64."""
    truth = case(shape, CHECKED_TOKENS)
    exact = [x.detach().double().requires_grad_() for x in (truth.hidden, truth.weight)]
    F.cross_entropy(F.linear(*exact), truth.targets).backward()
    errors: dict[str, list[float]] = {}
    counts = set()
    for name in (PLAIN, STEP, LOSS):
        x = case(shape, CHECKED_TOKENS)
        x.clear()
        result = candidates()[name](x)
        counts.add(int(result) if name == PLAIN else x.meter.compute().correct[1])
        errors[name] = [
            relative_error(leaf.grad, e.grad)  # type: ignore[arg-type]
            for leaf, e in zip((x.hidden, x.weight), exact, strict=True)
        ]
    ratios = [
        a / b for name in (STEP, LOSS) for a, b in zip(errors[name], errors[PLAIN], strict=True)
    ]
    if len(counts) > 1 or max(ratios) > 2:
        raise SystemExit(f"{shape} is not timed: counts {counts}, errors of gradients {errors}")
    return round(max(ratios), 3)


def measure(shape: str) -> dict[str, Any]:
    """Median seconds of each candidate; `busy` if something else used the machine."""
    error = check(shape)
    x = case(shape)
    calls = {name: partial(call, x) for name, call in candidates().items()}
    others = timing.Others()
    times = timing.in_turn(calls, ROUNDS, SECONDS, before=x.clear)
    return {
        "shape": shape,
        "seconds": timing.medians(times),
        "rounds": len(times[PLAIN]),
        "error over plain torch's": error,
        "busy": others.are_busy(),
    }


def peak(shape: str, name: str) -> float:
    """MiB that a call needs besides its inputs and the gradient of the weight."""
    warm = case(shape, 8)
    warm.clear()
    call = candidates()[name]
    call(warm)
    x = case(shape)
    x.clear()
    del warm
    return timing.peak_mib(partial(call, x))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds and MiB of each candidate, and the step beside the better of torch's."""
    names = list(rows[0]["seconds"])
    head = ["tokens x hidden x classes", *names, "step / better of torch's", "logits, MiB"]
    lines = [head]
    for row in rows:
        seconds = row["seconds"]
        rival = min(seconds[name] for name in (PLAIN, TORCH) if name in seconds)
        cells = [f"{seconds[name]:.3g} s, {row['MiB'][name]:.0f} MiB" for name in names]
        ratio = f"{seconds[STEP] / rival:.2f}"
        label = timing.label(row["shape"], row["busy"])
        lines.append([label, *cells, ratio, f"{row['logits_MiB']:.0f}"])
    return record.markdown(lines)


def main() -> None:
    """Measure each shape in new processes, print the table, and write the figures."""
    parser = record.parser("linear", __doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="[bf16:]TOKENSxHIDDENxCLASSES")
    parser.add_argument("--measure", metavar="SHAPE", help="time one shape here and print JSON")
    parser.add_argument(
        "--peak", nargs=2, metavar=("SHAPE", "CANDIDATE"), help="memory of one candidate, as JSON"
    )
    options = parser.parse_args()
    if options.measure or options.peak:
        print(json.dumps(peak(*options.peak) if options.peak else measure(options.measure)))
        return
    rows = []
    for shape in options.shapes or SHAPES:
        row = timing.in_new_process("linear", "--measure", shape)
        row["MiB"] = {
            name: round(timing.in_new_process("linear", "--peak", shape, name), 1)
            for name in row["seconds"]
        }
        tokens, _, classes = map(int, shape.removeprefix("bf16:").split("x"))
        row["logits_MiB"] = tokens * classes * (2 if shape.startswith("bf16:") else 4) / 2**20
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if not options.shapes:
        print(f"\n{record.write('linear', rows)}")


if __name__ == "__main__":
    main()
