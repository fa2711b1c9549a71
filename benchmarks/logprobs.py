"""Log-probabilities of targets and entropies beside two ways to write them with torch's own ops.

    python -m benchmarks logprobs                   # every shape, a few minutes on two cores
    python -m benchmarks logprobs 2048x50257        # one shape: rows x classes
    python -m benchmarks logprobs bf16:2048x50257

Each with and without entropies, forward alone and with the backward pass. Candidates alternate in
one process, and medians are reported; memory is the peak of one call in a process of its own,
besides the logits. Nothing is timed before results and gradients were checked against float64, on a
few rows. The time of our forward pass is also given over that of `logits.amax(-1)`, which reads
every logit once and computes next to nothing. How often the logits are read from memory is counted
in tests/kernels/test_row_reads.py. Figures of all shapes together are written to
results/logprobs.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing
from esper_kernels import token_logprobs
from esper_kernels.testing import relative_error

SHAPES = ("2048x50257", "bf16:2048x50257")
OURS = "token_logprobs"
READ = "a read"
SOFTMAX = "log_softmax().gather()"
LOGSUMEXP = "torch.logsumexp"
FORMS = ("forward", "forward, entropy", "both passes", "both passes, entropy")
ROUNDS = 7
SECONDS = 60.0
"""After which no further round of a form begins."""
CHECKED_ROWS = 64
Results = tuple[Tensor, ...]


def by_softmax(logits: Tensor, targets: Tensor, entropy: bool) -> Results:
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    return (logprobs, -(log_p.exp() * log_p).sum(-1)) if entropy else (logprobs,)


def by_logsumexp(logits: Tensor, targets: Tensor, entropy: bool) -> Results:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(x, -1)
    logprobs = x.gather(-1, targets[:, None])[:, 0] - lse
    return (logprobs, lse - (torch.softmax(x, -1) * x).sum(-1)) if entropy else (logprobs,)


def ours(logits: Tensor, targets: Tensor, entropy: bool) -> Results:
    results = token_logprobs(logits, targets, entropy=entropy)
    return results if isinstance(results, tuple) else (results,)


CANDIDATES: dict[str, Callable[[Tensor, Tensor, bool], Results]] = {
    SOFTMAX: by_softmax,
    LOGSUMEXP: by_logsumexp,
    OURS: ours,
}


def case(shape: str, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits and targets of a shape, or fewer rows of them."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, v = map(int, shape.removeprefix("bf16:").split("x"))
    n = rows or n
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(n, v, dtype=dtype)
    for part in logits.split(256):  # no float32 copy of all of them
        part.copy_(torch.randn(part.shape, generator=generator) * 3)
    targets = torch.randint(v, (n,), generator=generator)
    return logits.to(device), targets.to(device)


def run(name: str, form: str, logits: Tensor, targets: Tensor) -> tuple[Results, Tensor | None]:
    """The results of a candidate, and the gradient of their sum where the form has one."""
    entropy = form.endswith("entropy")
    if form.startswith("forward"):
        with torch.no_grad():
            return CANDIDATES[name](logits, targets, entropy), None
    leaf = logits.detach().requires_grad_()
    results = CANDIDATES[name](leaf, targets, entropy)
    (grad,) = torch.autograd.grad(results, leaf, [torch.ones_like(x) for x in results])
    return results, grad


def check(shape: str) -> None:
    """End the run if ours is further from float64 than twice the better of torch's forms."""
    logits, targets = case(shape, CHECKED_ROWS)
    *true, true_grad = _flat(run(SOFTMAX, FORMS[-1], logits.double(), targets))
    errors = {}
    for name in CANDIDATES:
        *results, grad = _flat(run(name, FORMS[-1], logits, targets))
        pairs = zip((*results, grad), (*true, true_grad), strict=True)
        errors[name] = [relative_error(a, b) for a, b in pairs]
    for own, *others in zip(errors[OURS], errors[SOFTMAX], errors[LOGSUMEXP], strict=True):
        if own > 2 * min(others) + 1e-6:
            raise SystemExit(f"{shape} is not timed: errors {errors}")


def _flat(found: tuple[Results, Tensor | None]) -> tuple[Tensor, ...]:
    results, grad = found
    assert grad is not None
    return (*results, grad)


def measure(shape: str) -> dict[str, Any]:
    """Median seconds of each candidate in each form, and of one read of the logits; `busy` if
    something else used the machine."""
    check(shape)
    logits, targets = case(shape)
    read: dict[str, Callable[[], Any]] = {READ: lambda: logits.amax(-1)}
    found = {}
    reads = []
    others = timing.Others()
    for form in FORMS:
        calls = {name: partial(run, name, form, logits, targets) for name in CANDIDATES}
        times = timing.in_turn(calls | read, ROUNDS, SECONDS)
        reads += times.pop(READ)
        found[form] = timing.medians(times)
    return {
        "shape": shape,
        "seconds": found,
        "seconds of a read": round(median(reads), 5),
        "busy": others.are_busy(),
    }


def peak(shape: str, name: str, form: str) -> float:
    """MiB that a call needs besides the logits, its results and its gradient included."""
    run(name, form, *case(shape, 8))
    logits, targets = case(shape)
    return timing.peak_mib(lambda: run(name, form, logits, targets))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per shape and form, with seconds and MiB of each candidate."""
    names = list(CANDIDATES)
    lines = [
        ["rows x classes", "logits, MiB", "form", *names, "ours / better of torch's", "ours / amax"]
    ]
    for row in rows:
        label = timing.label(row["shape"], row["busy"])
        for form in FORMS:
            seconds = row["seconds"][form]
            memory = row["MiB"][form]
            rival = min(seconds[name] for name in names if name != OURS)
            over_read = f"{seconds[OURS] / row['seconds of a read']:.2f}"
            cells = [f"{seconds[name]:.3g} s, {memory[name]:.0f} MiB" for name in names]
            cells += [f"{seconds[OURS] / rival:.2f}"]
            cells += [over_read if form.startswith("forward") else ""]
            lines.append([label, f"{row['logits_MiB']:.0f}", form, *cells])
    return record.markdown(lines)


def main() -> None:
    """Measure each shape in new processes, print the table, and write the figures."""
    parser = record.parser("logprobs", __doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="[bf16:]ROWSxCLASSES")
    parser.add_argument("--measure", metavar="SHAPE", help="time one shape here and print JSON")
    parser.add_argument(
        "--peak",
        nargs=3,
        metavar=("SHAPE", "CANDIDATE", "FORM"),
        help="memory of one candidate, as JSON",
    )
    options = parser.parse_args()
    if options.measure or options.peak:
        print(json.dumps(peak(*options.peak) if options.peak else measure(options.measure)))
        return
    rows = []
    for shape in options.shapes or SHAPES:
        row = timing.in_new_process("logprobs", "--measure", shape)
        row["MiB"] = {
            form: {
                name: round(timing.in_new_process("logprobs", "--peak", shape, name, form), 1)
                for name in CANDIDATES
            }
            for form in FORMS
        }
        n, v = map(int, shape.removeprefix("bf16:").split("x"))
        row["logits_MiB"] = n * v * (2 if shape.startswith("bf16:") else 4) / 2**20
        rows.append(row)
    print(table(rows))
    if not options.shapes:
        print(f"\n{record.write('logprobs', rows)}")


if __name__ == "__main__":
    main()
