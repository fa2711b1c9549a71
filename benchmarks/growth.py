"""Does growing pay? Test accuracy of grown networks and of their hosts, at several lengths of run.

    python -m benchmarks growth    # digits, 10 seeds, 75 to 600 epochs
    python -m benchmarks growth --task pysource --seeds 3 --epochs 60

grown: `esper-train heuristic`; fit: the same host, epochs and data without slots. Both give the
network that `keep` names. The figures of a run are printed and written as soon as it ends, and
those that the same commit has written before are not measured again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, mean, stdev
from typing import Any

from benchmarks import record
from esper_train import Event, EventType, TelemetryHub, run_fit, run_heuristic_episode
from esper_train.config import preset


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A grown network and its host. Accuracies on the test split in percent."""

    epochs: int
    seed: int
    grown: float
    fit: float
    parameters: int
    fossils: int
    undone: int
    undone_epochs: int
    harm: int
    """Longest time in epochs; see `longest_harm`."""
    harm_fit: int
    """The same for the host alone, measured from the same epochs."""

    @property
    def gain(self) -> float:
        """Percentage points."""
        return self.grown - self.fit


class Watch:
    """A sink that keeps what `longest_harm` needs."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.blended: list[int] = []

    def write(self, event: Event) -> None:
        if event.type is EventType.EPOCH:
            self.accuracies.append(event.data["validation"]["accuracy"])
        elif event.type is EventType.SEED_STAGE and event.data["stage"] == "BLENDING":
            self.blended.append(event.epoch)

    def close(self) -> None:
        """There is nothing to close."""


def longest_harm(
    accuracies: Sequence[float], blended: Sequence[int], *, window: int, points: float
) -> int:
    """For how many epochs in a row, at most, was accuracy more than `points` below its mean of the
    `window` epochs before blending began?

    `accuracies` has one of each epoch, and `blended` the epochs after which blending began.
    """
    longest = 0
    for began in blended:
        least = fmean(accuracies[max(0, began - window) : began]) - points
        lasted = 0
        for accuracy in accuracies[began:]:
            lasted = lasted + 1 if accuracy < least else 0
            longest = max(longest, lasted)
    return longest


def measure(task: str, epochs: int, seed: int) -> Pair:
    """Train both networks."""
    config = replace(preset(task), seed=seed, max_epochs=epochs)
    watch = Watch()
    watch_fit = Watch()
    grown = run_heuristic_episode(config, hub=TelemetryHub([watch]))
    fit = run_fit(config, hub=TelemetryHub([watch_fit]))
    harm, harm_fit = (
        longest_harm(
            accuracies,
            watch.blended,
            window=config.growth.window,
            points=config.growth.harm,
        )
        for accuracies in (watch.accuracies, watch_fit.accuracies)
    )
    return Pair(
        epochs=epochs,
        seed=seed,
        grown=grown.test.points,
        fit=fit.test.points,
        parameters=grown.parameters,
        fossils=grown.fossils,
        undone=grown.undone,
        undone_epochs=grown.undone_epochs,
        harm=harm,
        harm_fit=harm_fit,
    )


def measured_before(name: str) -> list[dict[str, Any]]:
    """The figures that this commit has written; none where they are of another."""
    if not (record.RESULTS / f"{name}.json").exists():
        return []
    found = record.read(name)
    same = found["environment"]["commit"] == record.environment()["commit"]
    figures: list[dict[str, Any]] = found["figures"] if same else []
    return figures


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: one row per length of run, with the mean gain and its standard error."""
    pairs = [Pair(**row) for row in figures]
    lines = [
        "| epochs | seeds | grown, % | fit, % | gain, points | below by more than 1 / 2 | kept | "
        "undone | harm, epochs | of fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for epochs in dict.fromkeys(pair.epochs for pair in pairs):
        rows = [pair for pair in pairs if pair.epochs == epochs]
        gains = [row.gain for row in rows]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        cells = [
            str(epochs),
            str(len(rows)),
            f"{mean(row.grown for row in rows):.2f}",
            f"{mean(row.fit for row in rows):.2f}",
            f"{mean(gains):+.2f} ± {error:.2f}",
            f"{sum(gain < -1 for gain in gains)} / {sum(gain < -2 for gain in gains)}",
            str(sum(row.fossils for row in rows)),
            str(sum(row.undone for row in rows)),
            str(max(row.harm for row in rows)),
            str(max(row.harm_fit for row in rows)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, nargs="+", default=[75, 150, 300, 600])
    options = parser.parse_args()
    name = f"growth-{options.task}"
    figures = measured_before(name)
    done = {(row["epochs"], row["seed"]) for row in figures}
    for epochs in options.epochs:
        for seed in range(options.seeds):
            if (epochs, seed) in done:
                continue
            last = measure(options.task, epochs, seed)
            figures.append(asdict(last))
            record.write(name, figures)
            print(
                f"{epochs} epochs, seed {seed}: grown {last.grown:.2f}, fit {last.fit:.2f}",
                flush=True,
            )
    print(f"\n{table(figures)}\n\n{record.RESULTS / name}.json")


if __name__ == "__main__":
    main()
