"""A task: its data, its type, and the host network that learns it.

Write one for your own data and pass it to `run_heuristic_episode` or `run_fit`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.train.data import Split

IGNORED = -100
"""A target that is left out of loss and counts."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The data of a task: inputs [N, ...] and targets [N] or [N, T] of each split."""

    train: Split
    validation: Split
    """What gates and controllers decide by."""
    test: Split
    """Only for reports: no decision sees it."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that identify the data, such as a digest; the run reports them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn, and with which host network."""

    name: str
    task_type: str
    """"classification" or "lm"."""
    num_classes: int
    """Number of classes, or size of the vocabulary."""
    load: Callable[[], Splits]
    """Returns the data, or raises if they are missing or damaged; it never substitutes other
    data."""
    build_host: Callable[[HostConfig], Host]
    """Makes a new host, initialized from torch's global random state."""


def load_splits(task: Task) -> Splits:
    """Load a task's data and check them.

    Raises `ValueError` for an empty split, sizes that differ, inputs that are not finite, and
    targets that are neither a class nor `IGNORED`.
    """
    splits = task.load()
    for name in ("train", "validation", "test"):
        inputs, targets = getattr(splits, name)
        where = f"task {task.name!r}, {name} data"
        if len(inputs) == 0 or len(inputs) != len(targets):
            sizes = f"{len(inputs)} and {len(targets)}"
            raise ValueError(
                f"{where}: expected as many inputs as targets, at least one, got {sizes}"
            )
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise ValueError(f"{where}: the inputs have NaN or infinite values")
        bad = targets[((targets < 0) | (targets >= task.num_classes)) & (targets != IGNORED)]
        if len(bad):
            expected = f"targets in [0, {task.num_classes}), or {IGNORED} to be ignored"
            raise ValueError(
                f"{where}: expected {expected}, got {len(bad)} others, the first {int(bad[0])}"
            )
    return splits
