"""The step with measures by class and of calibration, beside the bare step and torchmetrics.

    python -m benchmarks measures               # every shape, about two minutes on one thread
    python -m benchmarks measures 512x10
    python -m benchmarks measures bf16:2048x1000

Time of `cross_entropy_step` into a meter that counts loss and accuracy, with more measures from
column to column, and of torchmetrics' own update for counts by class and calibration on the same
logits. Candidates alternate in one process, and medians are reported. Nothing is timed before the
measures were checked against torchmetrics. Figures of all shapes together are written to
results/measures.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing
from esper_kernels import Meter, cross_entropy_step

SHAPES = ("64x10", "512x10", "2048x1000", "512x32000", "bf16:2048x1000")
BINS = 15
BARE = "bare step"
BOTH = "per class and calibration"
TORCHMETRICS = "torchmetrics alone"
ROUNDS = 101
SECONDS = 30.0
ELEMENTS = (
    1 << 20
)  # that one timed call reads at least: the clock is coarse for a single small step


def batch(shape: str) -> tuple[Tensor, Tensor]:
    """Logits and targets of a shape."""
    dtype = torch.bfloat16 if shape.startswith("bf16:") else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, classes = map(int, shape.removeprefix("bf16:").split("x"))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).mul_(3).to(device, dtype)
    return logits, torch.randint(classes, (rows,), generator=generator).to(device)


def meters(device: torch.device, classes: int) -> dict[str, Meter]:
    """A meter for each set of measures."""
    return {
        BARE: Meter(device),
        "per class": Meter(device, per_class=classes),
        "calibration": Meter(device, calibration_bins=BINS),
        BOTH: Meter(device, per_class=classes, calibration_bins=BINS),
        "all": Meter(device, per_class=classes, calibration_bins=BINS, entropy=True),
    }


def torchmetrics_of(logits: Tensor, targets: Tensor) -> Any:
    """torchmetrics' metrics for counts by class and calibration, which are told of batches."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassCalibrationError, MulticlassStatScores

    classes = logits.shape[-1]
    found = MetricCollection(
        [
            MulticlassStatScores(classes, average=None, validate_args=False),
            MulticlassCalibrationError(classes, n_bins=BINS, validate_args=False),
        ],
        compute_groups=False,
    ).to(logits.device)
    return found


def check(shape: str) -> None:
    """Compare the measures with those of torchmetrics."""
    logits, targets = batch(shape)
    meter = meters(logits.device, logits.shape[-1])[BOTH]
    cross_entropy_step(logits, targets, meter)
    result = meter.compute()
    theirs = torchmetrics_of(logits.float(), targets)
    theirs.update(logits.float(), targets)
    expected = theirs.compute()
    assert result.per_class is not None
    assert result.calibration is not None
    support = expected["MulticlassStatScores"][:, -1].tolist()
    correct = expected["MulticlassStatScores"][:, 0].tolist()
    if [list(result.per_class.support), list(result.per_class.correct)] != [support, correct]:
        raise AssertionError(f"{shape}: counts by class differ from torchmetrics'")
    error = abs(result.calibration.ece - float(expected["MulticlassCalibrationError"]))
    if error > 1e-4:
        raise AssertionError(f"{shape}: the calibration error differs by {error:.2g}")


def measure(shape: str) -> dict[str, Any]:
    """Median seconds of a step with each meter; `busy` if something else used the machine."""
    check(shape)
    logits, targets = batch(shape)
    out = torch.empty_like(logits)
    repeats = max(1, ELEMENTS // logits.numel())
    theirs = torchmetrics_of(logits, targets)

    def repeated(step: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats):
                step()

        return call

    def by_torchmetrics() -> None:
        theirs.reset()  # it would keep every confidence until the end of the epoch
        theirs.update(logits, targets)

    calls = {
        name: repeated(lambda meter=meter: cross_entropy_step(logits, targets, meter, out=out))
        for name, meter in meters(logits.device, logits.shape[-1]).items()
    }
    calls[TORCHMETRICS] = repeated(by_torchmetrics)
    others = timing.Others()
    times = timing.in_turn(calls, ROUNDS, SECONDS)
    return {
        "shape": shape,
        "seconds": {name: s / repeats for name, s in timing.medians(times).items()},
        "rounds": len(times[BARE]),
        "busy": others.are_busy(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the bare step in microseconds, the others as multiples of it."""
    names = list(rows[0]["seconds"])
    lines = [["shape", *names]]
    for row in rows:
        bare = row["seconds"][BARE]
        cells = [f"{1e6 * bare:.4g} us"]
        cells += [f"{row['seconds'][name] / bare:.2f}x" for name in names[1:]]
        lines.append([timing.label(row["shape"], row["busy"]), *cells])
    return record.markdown(lines)


def main() -> None:
    """Measure each shape, print the table, and write the figures."""
    parser = record.parser("measures", __doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="[bf16:]NxV")
    options = parser.parse_args()
    rows = []
    for shape in options.shapes or SHAPES:
        rows.append(measure(shape))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if not options.shapes:
        print(f"\n{record.write('measures', rows)}")


if __name__ == "__main__":
    main()
