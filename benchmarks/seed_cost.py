"""Measure the cost of a seed in TRAINING, in time and in multiply-adds.

    python -m benchmarks seed_cost

Epochs of training with one seed in TRAINING alternate with epochs of the same network without it,
on one thread. Both ratios are "with" over "without": the time of the fastest epoch (CPU time, which
other processes disturb least), and the multiply-adds as torch counts them and a run reports them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks import record
from esper_train import RunConfig, train_one_epoch
from esper_train.config import preset
from esper_train.morph.config import HostConfig
from esper_train.run.cost import seed_cost
from esper_train.run.episode import Episode
from esper_train.run.epoch import follow_optimizers
from esper_train.run.run import prepare

SLOTS = ("early", "mid", "late")
CASES = {
    "digits, width 8": replace(preset("digits"), host=HostConfig(width=8)),
    "digits, width 32": replace(preset("digits"), host=HostConfig(width=32)),
    "pysource": replace(preset("pysource"), max_batches=8),
}


def with_seed(config: RunConfig, slot: str) -> Episode:
    """An episode with a seed in TRAINING, of the first blueprint for its host."""
    episode = prepare(config, "heuristic")
    model = episode.model
    (first, *_) = model.registry.names(model.host.topology)
    for change in model.germinate_seed(first, "seed_0", slot=slot):
        follow_optimizers(episode, change, 0)
    return episode


def seconds(episode: Episode) -> float:
    """CPU time of an epoch of training."""
    started = time.process_time()
    train_one_epoch(
        episode.model,
        episode.train,
        episode.optimizers,
        episode.config.train,
        task_type=episode.task.task_type,
        max_batches=episode.config.max_batches,
        step=episode.step,
        learners=episode.learners(),
    )
    return time.process_time() - started


def measure(name: str, slot: str, rounds: int) -> dict[str, Any]:
    """Both ratios of one case."""
    config = CASES[name]
    without = prepare(config, "heuristic")
    grown = with_seed(config, slot)
    cost = seed_cost(grown.model, slot, grown.example)
    times = [(seconds(without), seconds(grown)) for _ in range(1 + rounds)][1:]
    host, both = (min(column) for column in zip(*times, strict=True))
    return {
        "case": name,
        "slot": slot,
        "blueprint": grown.model.slot(slot).state.blueprint,
        "seconds": host,
        "seconds_with_seed": both,
        "time": both / host,
        "multiply_adds": cost.ratio,
    }


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: one row per network and slot."""
    head = ["network", "slot", "blueprint", "epoch, ms", "time", "multiply-adds", "time / them"]
    rows = [
        [
            row["case"],
            row["slot"],
            row["blueprint"],
            record.short(1e3 * row["seconds"]),
            f"{row['time']:.2f}",
            f"{row['multiply_adds']:.2f}",
            f"{row['time'] / row['multiply_adds']:.2f}",
        ]
        for row in figures
    ]
    return record.markdown([head, *rows])


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = record.parser("seed_cost", __doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = [measure(name, slot, options.rounds) for name in options.cases for slot in SLOTS]
    path = record.write("seed-cost", figures)
    print(f"{table(figures)}\n\n{path}")


if __name__ == "__main__":
    main()
