"""Does growing pay? Grown networks against their hosts and static networks of their final size.

    python -m benchmarks growth    # digits, 10 seeds, 75 to 600 epochs
    python -m benchmarks growth --task pysource --seeds 0 1 2 --epochs 60
    python -m benchmarks growth --settings mine.toml    # writes growth-digits-mine.json

grown: `esper-train heuristic`. host: the same network without slots. static: the host with the
seeds that the grown one ended with, from the start. Host and static are trained for the same number
of epochs, and again at equal training cost: until they have spent the multiply-adds of the grown
run. Each gives the network that `keep` names. The figures of a seed are written as soon as they are
there, and those that the same commit has written before are not measured again, so a measurement
can be made in parts. With --continued, those of other commits are kept too; each names its own.
"""

from __future__ import annotations

import argparse
import math
import textwrap
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
DRAWN = {
    "digits": "growth-digits",
    "breast cancer": "growth-breast-cancer",
    "pysource": "growth-pysource-short",
}
"""What the picture shows, and the results."""
RIVALS = {
    "host": "host, same epochs",
    "static": "static, same epochs",
    "host_equal": "host, same cost",
    "static_equal": "static, same cost",
}
COLOURS = {"grown": "#c8553d", "host": "#9aa5b1", "static": "#2f6690"}
LABELS = {"grown": "grown", "host": "host alone", "static": "static"}


def gains(rows: Figures, rival: str) -> list[float]:
    """Accuracy of the grown network minus that of `rival` with the same seed, in percentage
    points."""
    return [row["grown"] - row[rival] for row in rows]


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error of the mean in words; a single value has none."""
    words = f"{fmean(values):{sign}.2f}"
    if len(values) == 1:
        return words
    return f"{words} ± {stdev(values) / math.sqrt(len(values)):.2f}"


def by_length(figures: Figures) -> dict[int, Figures]:
    """The figures of each length of run, in rising order."""
    lengths = sorted({row["epochs"] for row in figures})
    return {length: [row for row in figures if row["epochs"] == length] for length in lengths}


def mean_of(rows: Figures, name: str) -> float:
    return fmean(row[name] for row in rows)


def in_short(figures: Figures) -> str:
    """The paired gains at equal training cost, in two sentences."""
    lengths = by_length(figures)
    static, host = (
        ", ".join(
            f"{with_error(gains(rows, rival), '+')} points in runs of {epochs} epochs ({len(rows)} "
            f"seed{'s' * (len(rows) > 1)})"
            for epochs, rows in lengths.items()
        )
        for rival in ("static_equal", "host_equal")
    )
    words = (
        "At equal training cost, the test accuracy of grown networks minus that of static networks "
        f"of their final size is {static}. Minus that of their hosts, it is {host}."
    )
    return textwrap.fill(words, 100)


def table(figures: Figures) -> str:
    """Markdown: three tables, with a row per length of run in each."""
    parts = (_accuracies, _differences, _fates)
    return "\n\n".join(record.markdown(part(by_length(figures))) for part in parts)


def _accuracies(lengths: dict[int, Figures]) -> list[list[str]]:
    """Sizes, costs and accuracies."""
    heads = ["epochs", "seeds", "parameters", "cost of growing", "of a static epoch", "grown, %"]
    lines = [[*heads, *(f"{words}, %" for words in RIVALS.values())]]
    for epochs, rows in lengths.items():
        lines.append(
            [
                str(epochs),
                str(len(rows)),
                f"{rows[0]['host_parameters']:,} to {mean_of(rows, 'parameters'):,.0f}",
                f"{mean_of(rows, 'cost') / epochs:.2f}",
                f"{mean_of(rows, 'unit'):.2f}",
                *(with_error([row[name] for row in rows]) for name in ("grown", *RIVALS)),
            ]
        )
    return lines


def _differences(lengths: dict[int, Figures]) -> list[list[str]]:
    """Paired gains."""
    lines = [["epochs", *(f"grown - {words}" for words in RIVALS.values()), "more / same / less"]]
    for epochs, rows in lengths.items():
        found = [round(gain, 6) for gain in gains(rows, "static_equal")]
        signs = [sum(gain > 0 for gain in found), found.count(0), sum(gain < 0 for gain in found)]
        differences = (with_error(gains(rows, name), "+") for name in RIVALS)
        lines.append([str(epochs), *differences, " / ".join(map(str, signs))])
    return lines


def _fates(lengths: dict[int, Figures]) -> list[list[str]]:
    """A table of how many seeds were kept and undone, by the length of the runs."""
    heads = ["epochs", "kept", "undone", "epochs undone", "evaluations per epoch"]
    lines = [[*heads, "harm, epochs", "of host"]]
    for epochs, rows in lengths.items():
        lines.append(
            [
                str(epochs),
                str(sum(row["fossils"] for row in rows)),
                str(sum(row["undone"] for row in rows)),
                f"{100 * mean_of(rows, 'undone_epochs') / epochs:.0f} %",
                f"{mean_of(rows, 'evaluations') / epochs:.2f}",
                str(max(row["harm"] for row in rows)),
                str(max(row["harm_host"] for row in rows)),
            ]
        )
    return lines


def mean_curves(rows: Figures) -> dict[str, list[float]]:
    """The curve of each method, averaged over seeds."""
    return {
        method: [
            fmean(values) for values in zip(*(row["curves"][method] for row in rows), strict=True)
        ]
        for method in COLOURS
    }


def draw(path: Path, found: dict[str, Figures]) -> None:
    """Draw validation accuracy over training cost: a row of panels for each task, with one panel
    for each length of run."""
    lengths = {task: by_length(figures) for task, figures in found.items()}
    most = max(map(len, lengths.values()))
    size = (3.0 * most, 2.6 * len(lengths))
    with record.picture(path, *size, rows=len(lengths), columns=most) as panels:
        for number, (task, by_epochs) in enumerate(lengths.items()):
            row = panels[number * most : (number + 1) * most]
            for axes, (epochs, rows) in zip(row, by_epochs.items(), strict=False):
                _draw_panel(axes, f"{task}, {epochs} epochs, {len(rows)} seeds", rows)
            for axes in row[len(by_epochs) :]:
                axes.set_axis_off()
            row[0].set_ylabel("validation accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, frameon=False, ncols=3, loc="outside upper left")


def _draw_panel(axes: Any, title: str, rows: Figures) -> None:
    """Draw the mean curve of each method."""
    shares = [100 * number / POINTS for number in range(1, POINTS + 1)]
    curves = mean_curves(rows)
    for method, values in curves.items():
        axes.plot(shares, values, color=COLOURS[method], label=LABELS[method])
    # the first steps of learning would squeeze the rest
    late = [value for values in curves.values() for value in values[2 * POINTS // 5 :]]
    room = 0.1 * (max(late) - min(late)) + 0.05
    axes.set_ylim(min(late) - room, max(late) + room)
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_xlabel("training cost, % of growing's")


def measured_before(name: str, *, any_commit: bool = False) -> Figures:
    """The figures that this commit, or any, has written."""
    if not (record.RESULTS / f"{name}.json").exists():
        return []
    figures: Figures = record.read(name)["figures"]
    commit = record.environment()["commit"]
    return [row for row in figures if any_commit or row["commit"] == commit]


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = record.parser("growth", __doc__)
    parser.add_argument("--task", default="digits", choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, nargs="+", default=[75, 150, 600])
    parser.add_argument("--settings", type=Path, help="TOML with other settings of a run")
    parser.add_argument("--continued", action="store_true", help="keep figures of other commits")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    config = config_of(options.task)
    name = f"growth-{options.task}"
    if options.settings is not None:
        config = load_toml(options.settings, config)
        name = f"{name}-{options.settings.stem}"
    for epochs in options.epochs:
        for seed in options.seeds:
            figures = measured_before(name, any_commit=options.continued)
            if any((row["epochs"], row["seed"]) == (epochs, seed) for row in figures):
                continue
            last = compare(options.task, replace(config, seed=seed, max_epochs=epochs))
            last["commit"] = record.environment()["commit"]
            figures = sorted([*figures, last], key=lambda row: (row["epochs"], row["seed"]))
            record.write(name, figures)
            rivals = ", ".join(f"{key} {last[key]:.2f}" for key in RIVALS)
            print(f"{epochs} epochs, seed {seed}: grown {last['grown']:.2f}, {rivals}", flush=True)
    path = record.RESULTS / f"{name}.json"
    print(f"\n{table(record.read(name)['figures'])}\n\n{path}")


if __name__ == "__main__":
    main()
