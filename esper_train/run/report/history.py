"""The report's input: the events of a run, read back from its directory by kind and as series of
numbers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from esper_train.run.directory import METRICS, read_metrics

Record = Mapping[str, Any]


class History(NamedTuple):
    """The events of one run, by kind. `finished` is empty if the run did not report its end."""

    started: Record
    epochs: list[Record]  # for epochs 1, 2, ...; empty where none was reported
    moves: list[Record]  # changes of stage, without those that a rollback undid
    troubles: list[Record]  # events with a message: what went wrong, or was done about it
    layers: list[Record]
    costs: list[Record]  # of each seed that began to train
    finished: Record

    @property
    def status(self) -> str:
        return str(self.finished.get("status", "still running or killed"))

    @property
    def fossilized(self) -> list[Record]:
        return [move for move in self.moves if move["stage"] == "FOSSILIZED"]

    def series(self, *path: str | int) -> list[float]:
        """One number per epoch; NaN where there is none."""
        return [number_at(epoch, *path) for epoch in self.epochs]


def read_history(directory: Path) -> History | None:
    """The last run in the metrics of a directory; None if there is none."""
    events = read_metrics(directory) if (directory / METRICS).is_file() else []
    starts = [place for place, event in enumerate(events) if event["event"] == "run_started"]
    if not starts:
        return None
    kinds: dict[str, list[Record]] = defaultdict(list)
    for event in events[starts[-1] :]:
        kinds["trouble" if "message" in event else event["event"]].append(event)
        if event["event"] == "rollback":
            kinds["seed_stage"] = [
                move for move in kinds["seed_stage"] if move["epoch"] <= event["to_epoch"]
            ]
    start, *ends = kinds["run_started"] + kinds["run_finished"]
    known = {event["epoch"]: event for event in kinds["epoch"]}
    epochs = [known.get(epoch, {}) for epoch in range(1, 1 + max(known, default=0))]
    more = kinds["seed_stage"], kinds["trouble"], kinds["layer_gradients"], kinds["seed_cost"]
    return History(start, epochs, *more, ends[0] if ends else {})


def in_training(epoch: Record) -> list[Record]:
    return [slot for slot in epoch["slots"] if slot["stage"] == "TRAINING"]


def number_at(record: Any, *path: str | int) -> float:
    """The number at the end of the path; NaN if it is null or the path does not exist."""
    with suppress(LookupError, TypeError):
        for key in path:
            record = record[key]
        return float(record)
    return math.nan


def finite_values(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def finite_median(values: Sequence[float]) -> float:
    finite = finite_values(values)
    return median(finite) if finite else math.nan
