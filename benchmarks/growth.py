"""Does growing pay? Grown networks against their hosts and static networks of their final size.

    python -m benchmarks growth    # digits, 10 seeds, 75 to 600 epochs
    python -m benchmarks growth --task pysource --seeds 0 1 2 --epochs 60
    python -m benchmarks growth --settings mine.toml    # writes growth-digits-mine.json

grown: `esper-train heuristic`. host: the same network without slots. static: the host with the
seeds that the grown one ended with, from the start. Host and static are trained for the same number
of epochs, and again at equal training cost: until they have spent the multiply-adds of the grown
run. Each gives the network that `keep` names. The figures of a seed are written as soon as they are
there, and those that the same commit has written before are not measured again, so a measurement
can be made in parts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks import record
from benchmarks.growth_runs import NAMES, POINTS, compare, config_of
from esper_train.config import load_toml

Figures = list[dict[str, Any]]
TASKS = {"digits": "digits", "pysource": "pysource", "breast-cancer": "breast cancer"}
"""Tasks of the tables and the picture, with their names there."""
RIVALS = {
    "host": "host, same epochs",
    "static": "static, same epochs",
    "host_equal": "host, same cost",
    "static_equal": "static, same cost",
}
COLOURS = {"grown": "#c8553d", "host": "#9aa5b1", "static": "#2f6690"}
LABELS = {"grown": "grown", "host": "host alone", "static": "static, of the grown size"}


def gains(rows: Figures, rival: str) -> list[float]:
    """Accuracy of the grown network minus that of `rival` with the same seed, in percentage
    points."""
    return [row["grown"] - row[rival] for row in rows]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error in words."""
    return f"{fmean(values):{sign}.2f} ± {standard_error(values):.2f}"


def by_length(figures: Figures) -> dict[int, Figures]:
    """The figures of each length of run, in rising order."""
    lengths = sorted({row["epochs"] for row in figures})
    return {length: [row for row in figures if row["epochs"] == length] for length in lengths}


def mean_of(rows: Figures, name: str) -> float:
    return fmean(row[name] for row in rows)


def short_table(figures: Figures) -> str:
    """Markdown: accuracies at equal training cost, and paired gains."""
    lines = [
        ["epochs", "seeds", "grown, %", "host, %", "static, %", "grown - host", "grown - static"]
    ]
    for epochs, rows in by_length(figures).items():
        lines.append(
            [
                str(epochs),
                str(len(rows)),
                *(f"{mean_of(rows, name):.2f}" for name in ("grown", "host_equal", "static_equal")),
                *(with_error(gains(rows, name), "+") for name in ("host_equal", "static_equal")),
            ]
        )
    return record.markdown(lines)


def table(figures: Figures) -> str:
    """Markdown: three tables, with a row per length of run in each: sizes, costs and accuracies;
    paired gains; what became of the seeds."""
    lengths = by_length(figures)
    accuracies = [
        [
            "epochs",
            "seeds",
            "parameters, host to grown",
            "cost of growing",
            "of a static epoch",
            "grown, %",
            *(f"{words}, %" for words in RIVALS.values()),
        ]
    ]
    differences = [
        ["epochs", *(f"grown - {words}" for words in RIVALS.values()), "above / equal / below"]
    ]
    fates = [
        [
            "epochs",
            "kept",
            "undone",
            "epochs undone, of 100",
            "evaluations per epoch",
            "harm, epochs",
            "of host",
        ]
    ]
    for epochs, rows in lengths.items():
        accuracies.append(
            [
                str(epochs),
                str(len(rows)),
                f"{rows[0]['host_parameters']:,} to {mean_of(rows, 'parameters'):,.0f}",
                f"{mean_of(rows, 'cost') / epochs:.2f}",
                f"{mean_of(rows, 'unit'):.2f}",
                *(with_error([row[name] for row in rows]) for name in ("grown", *RIVALS)),
            ]
        )
        found = gains(rows, "static_equal")
        signs = [
            sum(gain > 1e-9 for gain in found),
            sum(abs(gain) <= 1e-9 for gain in found),
            sum(gain < -1e-9 for gain in found),
        ]
        differences.append(
            [
                str(epochs),
                *(with_error(gains(rows, name), "+") for name in RIVALS),
                " / ".join(map(str, signs)),
            ]
        )
        fates.append(
            [
                str(epochs),
                str(sum(row["fossils"] for row in rows)),
                str(sum(row["undone"] for row in rows)),
                f"{100 * mean_of(rows, 'undone_epochs') / epochs:.0f}",
                f"{mean_of(rows, 'evaluations') / epochs:.2f}",
                str(max(row["harm"] for row in rows)),
                str(max(row["harm_host"] for row in rows)),
            ]
        )
    return "\n\n".join(record.markdown(lines) for lines in (accuracies, differences, fates))


def mean_curves(rows: Figures) -> dict[str, list[float]]:
    """The curve of each method, averaged over seeds."""
    return {
        method: [
            fmean(values) for values in zip(*(row["curves"][method] for row in rows), strict=True)
        ]
        for method in COLOURS
    }


def draw(path: Path, found: dict[str, Figures]) -> None:
    """Draw validation accuracy over training cost, by task and length of run."""
    panels = [
        (f"{task}, {epochs} epochs", rows)
        for task, figures in found.items()
        for epochs, rows in by_length(figures).items()
    ]
    shares = [100 * number / POINTS for number in range(1, POINTS + 1)]
    with record.picture(path, 2.6 * len(panels), 3.2, columns=len(panels)) as columns:
        for axes, (title, rows) in zip(columns, panels, strict=True):
            curves = mean_curves(rows)
            for method, values in curves.items():
                axes.plot(shares, values, color=COLOURS[method], label=LABELS[method])
            # the first steps of learning would squeeze the rest
            late = [value for values in curves.values() for value in values[POINTS // 5 :]]
            room = 0.1 * (max(late) - min(late)) + 0.05
            axes.set_ylim(min(late) - room, max(late) + room)
            axes.set_title(f"{title}, {len(rows)} seeds", fontsize=9, loc="left")
            axes.set_xlabel("training cost, % of growing's")
        columns[0].set_ylabel("validation accuracy, %")
        columns[0].legend(frameon=False, fontsize=8, loc="lower right")


def measured_before(name: str) -> Figures:
    """The figures that this commit has written; none where they are of another."""
    if not (record.RESULTS / f"{name}.json").exists():
        return []
    found = record.read(name)
    same = found["environment"]["commit"] == record.environment()["commit"]
    figures: Figures = found["figures"] if same else []
    return figures


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = record.parser("growth", __doc__)
    parser.add_argument("--task", default="digits", choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, nargs="+", default=[75, 150, 600])
    parser.add_argument("--settings", type=Path, help="TOML with other settings of a run")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    config = config_of(options.task)
    name = f"growth-{options.task}"
    if options.settings is not None:
        config = load_toml(options.settings, config)
        name = f"{name}-{options.settings.stem}"
    for epochs in options.epochs:
        for seed in options.seeds:
            figures = measured_before(name)
            if any((row["epochs"], row["seed"]) == (epochs, seed) for row in figures):
                continue
            last = compare(options.task, replace(config, seed=seed, max_epochs=epochs))
            figures = sorted([*figures, last], key=lambda row: (row["epochs"], row["seed"]))
            record.write(name, figures)
            rivals = ", ".join(f"{key} {last[key]:.2f}" for key in RIVALS)
            print(f"{epochs} epochs, seed {seed}: grown {last['grown']:.2f}, {rivals}", flush=True)
    path = record.RESULTS / f"{name}.json"
    print(f"\n{table(measured_before(name))}\n\n{path}")


if __name__ == "__main__":
    main()
