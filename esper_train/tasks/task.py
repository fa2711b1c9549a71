"""A task: data, its kind, and the host to learn it with. Write one for your own data and pass it to `episode`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.train.data import Split

IGNORED = -100
"""A target that has no part in loss or counts."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Inputs [N, ...] and targets [N] or [N, T] of each part."""

    train: Split
    validation: Split
    """For gates and controllers, which therefore see it."""
    test: Split
    """For reports only."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What identifies the data, as plain values; the run reports it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn and with what.

    `load` returns the data or raises; it never makes any up. `build_host` makes a fresh host from torch's
    global random state.
    """

    name: str
    task_type: str
    """"classification" or "lm"."""
    num_classes: int
    """Classes, or entries of the vocabulary."""
    load: Callable[[], Splits]
    build_host: Callable[[HostConfig], Host]


def load_splits(task: Task) -> Splits:
    """A task's data, checked: sizes that fit, finite inputs, targets within the classes."""
    splits = task.load()
    for name in ("train", "validation", "test"):
        inputs, targets = getattr(splits, name)
        where = f"task {task.name!r}, {name} data"
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(f"{where}: expected as many inputs as targets, got {len(inputs)} and {len(targets)}")
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise ValueError(f"{where}: the inputs have NaN or infinite values")
        bad = targets[((targets < 0) | (targets >= task.num_classes)) & (targets != IGNORED)]
        if len(bad):
            expected = f"targets in [0, {task.num_classes}), or {IGNORED} to be ignored"
            raise ValueError(f"{where}: expected {expected}, got {len(bad)} others, the first {int(bad[0])}")
    return splits
