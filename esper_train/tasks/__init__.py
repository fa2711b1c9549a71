"""The tasks that `esper-train --task` knows by name."""

from collections.abc import Callable, Mapping

from esper_train.base.names import require_known
from esper_train.tasks.cifar10 import cifar10
from esper_train.tasks.config import PRESETS, TaskConfig
from esper_train.tasks.digits import digits
from esper_train.tasks.pysource import pysource
from esper_train.tasks.synthetic import synthetic, synthetic_lm
from esper_train.tasks.task import Splits, Task, load_splits
from esper_train.train.data import Split

TASKS: Mapping[str, Callable[[TaskConfig], Task]] = {
    "digits": digits,
    "pysource": pysource,
    "cifar10": cifar10,
    "synthetic": synthetic,
    "synthetic-lm": synthetic_lm,
}


def get_task(name: str, config: TaskConfig | None = None) -> Task:
    """The task of this name, with its config; `ValueError` lists the known names."""
    require_known("task", name, TASKS)
    return TASKS[name](config or TaskConfig())


__all__ = ["PRESETS", "TASKS", "Split", "Splits", "Task", "TaskConfig", "get_task", "load_splits"]
