"""The tasks that `esper-train --task` knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from esper_train.names import unknown_name
from esper_train.tasks.digits import digits
from esper_train.tasks.synthetic import synthetic, synthetic_lm
from esper_train.tasks.task import Split, Splits, Task, load_splits, make_loader

TASKS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {"digits": digits, "synthetic": synthetic, "synthetic-lm": synthetic_lm}
)


def get_task(name: str) -> Task:
    """A task by name; `ValueError` names the known ones."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]()


__all__ = ["TASKS", "Split", "Splits", "Task", "get_task", "load_splits", "make_loader"]
