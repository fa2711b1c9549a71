"""Cross entropy of logits with the classes in dimension 1, beside torch's own and beside a copy.

    python -m benchmarks classes_first          # every shape, a minute or two on one thread
    python -m benchmarks classes_first 8x21x128x128
    python -m benchmarks classes_first bf16:8x21x128x128

Time of loss, correct count and the gradient of the logits, in their own layout. Candidates
alternate in one process, and medians are reported. Nothing is timed before gradients and counts
were checked against float64. Figures of all shapes together are written to
results/classes-first.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record, timing
from esper_kernels import Meter, cross_entropy, cross_entropy_step
from esper_kernels.testing import relative_error

SHAPES = (
    "8x21x128x128",
    "4x1000x7x7",
    "32x50257x16",
    "bf16:8x21x128x128",
    "bf16:4x1000x7x7",
    "bf16:32x50257x16",
)
PLAIN = "F.cross_entropy, argmax"
STEP = "cross_entropy_step"
ROUNDS = 31
SECONDS = 30.0


@dataclass
class Case:
    logits: Tensor  # [N, V, d, ...]
    targets: Tensor  # [N, d, ...]
    meter: Meter


def case(shape: str) -> Case:
    """The inputs of a shape."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = tuple(map(int, shape.removeprefix("bf16:").split("x")))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sizes, generator=generator).to(device, dtype)
    targets = torch.randint(sizes[1], (sizes[0], *sizes[2:]), generator=generator).to(device)
    return Case(logits.requires_grad_(), targets, Meter(device))


def plain(x: Case) -> Tensor:
    loss = F.cross_entropy(x.logits, x.targets)
    correct = (x.logits.argmax(1) == x.targets).sum()
    (grad,) = torch.autograd.grad(loss, x.logits)
    x.meter.on_device()["correct@1"].add_(correct)
    return grad


def by_step(x: Case) -> Tensor:
    return cross_entropy_step(x.logits.detach(), x.targets, x.meter, class_dim=1)


def by_copy(x: Case) -> Tensor:
    copy = x.logits.detach().movedim(1, -1).contiguous()
    grad = cross_entropy_step(copy, x.targets, x.meter, inplace=True)
    return grad.movedim(-1, 1).contiguous()


def by_autograd(x: Case) -> Tensor:
    loss = cross_entropy(x.logits, x.targets, class_dim=1, meter=x.meter)
    (grad,) = torch.autograd.grad(loss, x.logits)
    return grad


CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    PLAIN: plain,
    STEP: by_step,
    "a copy with the classes last": by_copy,
    "autograd form": by_autograd,
}


def check(shape: str) -> float:
    """Compare gradients and counts; the error of the step's gradient over that of plain torch's."""
    x = case(shape)
    wide = x.logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, x.targets), wide)
    correct = int((x.logits.argmax(1) == x.targets).sum())
    errors = {}
    for name, call in CANDIDATES.items():
        x.meter.reset()
        errors[name] = relative_error(call(x), truth)
        found = x.meter.compute().correct[1]
        if found != correct:
            raise AssertionError(f"{shape}, {name}: {found} correct, expected {correct}")
        if errors[name] > 2 * errors[PLAIN] + 1e-6:
            raise AssertionError(f"{shape}, {name}: error {errors[name]:.2g}, {errors[PLAIN]:.2g}")
    return errors[STEP] / max(errors[PLAIN], 1e-12)


def measure(shape: str) -> dict[str, Any]:
    """Median seconds of each candidate; `busy` if something else used the machine."""
    error = check(shape)
    x = case(shape)
    calls = {name: partial(call, x) for name, call in CANDIDATES.items()}
    others = timing.Others()
    times = timing.in_turn(calls, ROUNDS, SECONDS)
    return {
        "shape": shape,
        "seconds": timing.medians(times),
        "rounds": len(times[PLAIN]),
        "error over plain torch's": error,
        "busy": others.are_busy(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds of each candidate, and the step beside torch's."""
    lines = [["shape", *CANDIDATES, "step / torch's"]]
    for row in rows:
        seconds = row["seconds"]
        cells = [f"{1e3 * seconds[name]:.3g} ms" for name in CANDIDATES]
        label = timing.label(row["shape"], row["busy"])
        lines.append([label, *cells, f"{seconds[STEP] / seconds[PLAIN]:.2f}"])
    return record.markdown(lines)


def main() -> None:
    """Measure each shape, print the table, and write the figures."""
    parser = record.parser("classes_first", __doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="[bf16:]NxVxd...")
    options = parser.parse_args()
    rows = []
    for shape in options.shapes or SHAPES:
        rows.append(measure(shape))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if not options.shapes:
        print(f"\n{record.write('classes-first', rows)}")


if __name__ == "__main__":
    main()
