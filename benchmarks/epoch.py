"""Whole epochs by our loop beside the same work written in plain PyTorch.

    python -m benchmarks epoch                  # every case
    python -m benchmarks epoch digits:8x64      # one case
    python -m benchmarks epoch tiny             # only to see that it runs

An epoch is training with gradient statistics, then validation: once with the whole network, and
once with each slot ablated. The plain loop has eager cross entropy, argmax and comparison, sums on
the device, statistics gradient by gradient, torch's default SGD, and a validation pass per
variant with batches of the training size. Our loop chooses memory format and validation batches as
a run does by default. Model, seed, data order and learning rate are the same, and a case is timed
only after the losses of both agree for two epochs. Rounds alternate, and medians are reported.

Each case has two more figures: what the loop itself costs (`loop_cost`), and what validation with
ablated slots costs beside the ideal, which recomputes only what follows the slot
(`evaluation_cost`). Figures of all cases together are written to results/epoch.json.

Long file: both loops, ours and the plain one, are read side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import record
from benchmarks.epoch_cases import (
    CASES,
    SLOTS,
    Case,
    data_of,
    evaluation_batch,
    images_pay_channels_last,
    model_of,
)
from esper_kernels import Meter, cross_entropy_step, grad_stats
from esper_train import (
    AmpConfig,
    CompileConfig,
    MorphModel,
    OptimConfig,
    TrainConfig,
    build_train_step,
    evaluate,
    train_one_epoch,
)
from esper_train.train.data import Loader
from esper_train.train.optimizers import make_optimizer

LR = 0.01
SGD = OptimConfig(momentum=0.9, weight_decay=0.0)
LOOP_BATCHES = 16  # per epoch, where the loop's own cost is measured


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def plain_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The numbers of `grad_stats`, computed gradient by gradient; they stay on the device until the
    epoch ends."""
    grads = [p.grad.detach() for p in model.parameters() if p.grad is not None]
    return {
        "norms": torch.stack([g.norm() for g in grads]),
        "max_abs": torch.stack([g.abs().max() for g in grads]),
        "zeros": torch.stack([(g == 0).sum() for g in grads]),
        "nans": torch.stack([g.isnan().sum() for g in grads]),
        "infs": torch.stack([g.isinf().sum() for g in grads]),
    }


def plain_epoch(
    model: MorphModel,
    optimizer: torch.optim.Optimizer,
    train: Iterable[Any],
    validation: Iterable[Any],
    slots: tuple[str, ...],
) -> list[float]:
    """The baseline; returns the losses of training and of each validation pass."""
    totals: list[tuple[Tensor, Tensor, int]] = []

    def count(logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        loss_sum, correct, n = totals[-1]
        loss_sum.add_(loss.detach() * targets.numel())
        correct.add_((logits.argmax(-1) == targets).sum())
        totals[-1] = (loss_sum, correct, n + targets.numel())

    def begin() -> None:
        totals.append((torch.zeros(()), torch.zeros((), dtype=torch.int64), 0))

    begin()
    statistics: dict[str, Tensor] = {}
    model.train()
    for inputs, targets in train:
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs)
        loss = plain_loss(logits, targets)
        loss.backward()
        statistics = plain_statistics(model)
        optimizer.step()
        count(logits, targets, loss)
    model.eval()
    with torch.no_grad():
        for alpha in (None, *({slot: 0.0} for slot in slots)):
            begin()
            for inputs, targets in validation:
                logits = model(inputs, alpha=alpha)
                count(logits, targets, plain_loss(logits, targets))
    for value in statistics.values():
        value.tolist()
    return [float(loss_sum) / n for loss_sum, _, n in totals]


def candidates(case: Case) -> dict[str, Callable[[], list[float]]]:
    """The loops to compare, by name. Each call of one trains its own copy of the model for one more
    epoch and returns the losses."""
    split = data_of(case)
    slots = SLOTS[: case.slots]
    task_type = "lm" if case.kind in ("pysource", "lm") else "classification"

    def shuffled() -> Loader:
        return Loader(split, case.batch, shuffle=torch.Generator().manual_seed(0))

    def plain(own_loader: bool) -> Callable[[], list[float]]:
        model = model_of(case)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        validation: Iterable[Any] = Loader(split, case.batch)
        train: Iterable[Any] = shuffled()
        if own_loader:  # it collates sample by sample, and shuffles in an order of its own
            train = DataLoader(TensorDataset(*split), case.batch, shuffle=True)
            validation = DataLoader(TensorDataset(*split), case.batch)
        return lambda: plain_epoch(model, optimizer, train, validation, slots)

    def ours(
        config: TrainConfig, channels_last: bool = images_pay_channels_last(case)
    ) -> Callable[[], list[float]]:
        model = model_of(case)
        step = build_train_step(task_type, config)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = make_optimizer(list(model.parameters()), LR, SGD)
        train = shuffled()
        validation = Loader(split, evaluation_batch(case))
        shared: dict[str, Any] = {"task_type": task_type, "step": step}
        variants = {slot: {slot: 0.0} for slot in slots}

        def epoch() -> list[float]:
            trained = train_one_epoch(model, train, optimizer, config, **shared)
            measured = evaluate(model, validation, config, variants=variants, **shared)
            return [trained.loss, measured.loss, *(measured.variants[slot].loss for slot in slots)]

        return epoch

    compiled = TrainConfig(compile=CompileConfig(enabled=True, dynamic=False))
    found = {
        "plain": plain(own_loader=False),
        "plain, DataLoader": plain(own_loader=True),
        "ours": ours(TrainConfig()),
        "ours, bfloat16": ours(TrainConfig(amp=AmpConfig(dtype="bfloat16"))),
        "ours, compiled": ours(compiled),
    }
    if images_pay_channels_last(case):
        found["ours, compiled, channels first"] = ours(compiled, channels_last=False)
    return found


def loop_cost(case: Case, rounds: int) -> dict[str, float]:
    """Microseconds of `train_one_epoch`, per batch and per epoch, beyond a loop without loss or
    metrics.

    That loop has forward, backward from a given gradient, and the optimizer step. "us by hand" is
    the same loop with our two ops in it: what they cost when the caches hold other data. All loops
    train on one batch again and again. Each figure is the median of differences within a round; the
    first and second half show whether it grows with time.
    """
    model = model_of(case)
    config = TrainConfig()
    task_type = "lm" if case.kind in ("pysource", "lm") else "classification"
    step = build_train_step(task_type, config)
    parameters = list(model.parameters())
    # The learning rate is 0, because arithmetic on the tiny gradients of a learned batch is slow.
    optimizer = make_optimizer(parameters, 0.0, SGD)
    meter = Meter("cpu")
    inputs, targets = next(iter(Loader(data_of(case), case.batch)))
    with torch.no_grad():
        gradient = torch.randn_like(model(inputs)) / inputs.shape[0]

    def plainest(batches: int) -> None:
        model.train()
        for _ in range(batches):
            for p in parameters:
                p.grad = None
            model(inputs).backward(gradient)
            optimizer.step()

    def by_hand(batches: int) -> None:
        model.train()
        stats = None
        for _ in range(batches):
            for p in parameters:
                p.grad = None
            logits = model(inputs)
            logits.backward(cross_entropy_step(logits, targets, meter, out=gradient))
            stats = grad_stats([p.grad for p in parameters], out=stats)
            optimizer.step()

    def ours(batches: int) -> None:
        train_one_epoch(
            model, [(inputs, targets)] * batches, optimizer, config, task_type=task_type, step=step
        )

    everything = torch.cat([p.detach().flatten() for p in parameters])
    more = LOOP_BATCHES - 1
    rows = []
    for _ in range(rounds + 1):
        one, many = (
            [seconds(lambda loop=loop, n=n: loop(n)) for loop in (plainest, by_hand, ours)]
            for n in (1, 1 + more)
        )
        plain, hand, own = (1e6 * (b - a) / more for a, b in zip(one, many, strict=True))
        rows.append(
            (own - plain, hand - plain, 1e6 * (one[2] - one[0]), 1e6 * seconds(everything.sum))
        )
    own_cost, hand_cost, epoch_cost, read = zip(*rows[1:], strict=True)
    return {
        "us per batch": median(own_cost),
        "us per batch, first half": median(own_cost[: rounds // 2]),
        "us per batch, second half": median(own_cost[rounds // 2 :]),
        "us by hand": median(hand_cost),
        "us per epoch": median(epoch_cost),
        "us of a read": median(read),
    }


def evaluation_cost(case: Case, rounds: int) -> dict[str, float]:
    """The time of `evaluate` with each slot ablated, over that without, and what the ideal would
    be.

    With three slots, the last two are ablated.
    """
    split = data_of(case)
    model = model_of(case)
    slots = SLOTS[1:] if case.slots == 3 else SLOTS[: case.slots]
    task_type = "lm" if case.kind in ("pysource", "lm") else "classification"
    if images_pay_channels_last(case):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = TrainConfig()
    batches = list(Loader(split, evaluation_batch(case)))
    step = build_train_step(task_type, config)

    def measured(*names: str) -> Callable[[], object]:
        variants = {slot: {slot: 0.0} for slot in names}
        return lambda: evaluate(
            model, batches, config, task_type=task_type, step=step, variants=variants
        )

    model.eval()
    with torch.no_grad():
        whole_passes = partial(forward_all, model, [(inputs, {}) for inputs, _ in batches])
        entered = [model.forward_keeping(inputs)[1] for inputs, _ in batches]
        tails = [
            partial(
                forward_all,
                model,
                [(kept[slot], {"start": slot, "alpha": {slot: 0.0}}) for kept in entered],
            )
            for slot in slots
        ]
        runs = [whole_passes, *tails, measured(), measured(*slots)]
        times = [[seconds(run) for run in runs] for _ in range(rounds + 1)][1:]
    whole, *shares, plain, ablated = (median(column) for column in zip(*times, strict=True))
    return {"over one pass": ablated / plain, "ideal": 1 + sum(shares) / whole}


def forward_all(model: MorphModel, calls: list[tuple[Tensor, dict[str, Any]]]) -> None:
    for features, arguments in calls:
        model(features, **arguments)  # the result is dropped at once, so its memory is reused


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Median seconds per epoch of each candidate, after two epochs in which the losses agreed."""
    case = CASES[name]
    runs = candidates(case)
    curves = {label: [run(), run()] for label, run in runs.items()}
    for label in curves:
        exact = label.startswith("ours") and "bfloat16" not in label
        if exact and not torch.allclose(
            torch.tensor(curves[label]), torch.tensor(curves["plain"]), rtol=2e-3
        ):
            raise SystemExit(
                f"{name}: losses differ, so nothing is timed: {curves['plain']} and {curves[label]}"
            )
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(seconds(run))
    return {
        "case": name,
        "samples": case.samples,
        "batches": math.ceil(case.samples / case.batch),
        "seconds": {k: median(t) for k, t in times.items()},
        "spread": median((median(t) - min(t)) / min(t) for t in times.values()),
        "loop": loop_cost(case, rounds),
        "evaluation": evaluation_cost(case, rounds) if case.slots else None,
    }


Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "epochs/s": lambda row: record.short(1 / row["seconds"]["ours"]),
    "samples/s": lambda row: record.short(row["samples"] / row["seconds"]["ours"]),
    "faster than plain": lambda row: times(row, "plain", "ours"),
    "than with `DataLoader`": lambda row: times(row, "plain, DataLoader", "ours"),
    "compiled, faster than plain": lambda row: times(row, "plain", fastest_compiled(row)),
    "bfloat16, faster than float32": lambda row: times(row, "ours", "ours, bfloat16"),
    "loop, us per batch": lambda row: f"{row['loop']['us per batch']:.0f}",
    "two ops by hand": lambda row: f"{row['loop']['us by hand']:.0f}",
    "loop, us per epoch": lambda row: f"{row['loop']['us per epoch']:.0f}",
    "with ablations": lambda row: evaluation(row, "over one pass"),
    "ideal": lambda row: evaluation(row, "ideal"),
}
"""The columns of the table, from a row of `measure`."""


def times(row: Row, slower: str, faster: str) -> str:
    return f"{row['seconds'][slower] / row['seconds'][faster]:.2f}x"


def fastest_compiled(row: Row) -> str:
    """The faster of the compiled candidates, which differ in their memory format."""
    seconds_of = row["seconds"]
    return min(
        (name for name in seconds_of if name.startswith("ours, compiled")),
        key=seconds_of.__getitem__,
    )


def evaluation(row: Row, name: str) -> str:
    return f"{row['evaluation'][name]:.2f}" if row["evaluation"] else ""


def table(rows: list[Row]) -> str:
    """Markdown: how our loop compares, what it costs per batch, and what ablations cost."""
    lines = [["case", *COLUMNS]]
    for row in rows:
        busy = " (busy)" if row["spread"] > 0.3 else ""
        lines.append([row["case"] + busy, *(column(row) for column in COLUMNS.values())])
    return record.markdown(lines)


def main() -> None:
    """Measure the cases, print the table, and write the figures."""
    parser = record.parser("epoch", __doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    names = parser.parse_args().cases
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    rows = []
    for name in names or [name for name in CASES if name != "tiny"]:
        rows.append(measure(name, rounds=3 if name == "tiny" else 15))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if not names:
        print(f"\n{record.write('epoch', rows)}")


if __name__ == "__main__":
    main()
