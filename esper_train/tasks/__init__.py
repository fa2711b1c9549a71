"""The tasks that `esper-train --task` knows by name."""

from collections.abc import Callable, Mapping

from esper_train.config import RunConfig
from esper_train.names import require_known
from esper_train.tasks.cifar10 import cifar10
from esper_train.tasks.digits import digits
from esper_train.tasks.pysource import PRESET as PYSOURCE_PRESET
from esper_train.tasks.pysource import pysource
from esper_train.tasks.synthetic import synthetic, synthetic_lm
from esper_train.tasks.task import Loader, Split, Splits, Task, load_splits

TASKS: Mapping[str, Callable[[RunConfig], Task]] = {
    "digits": digits,
    "pysource": pysource,
    "cifar10": cifar10,
    "synthetic": synthetic,
    "synthetic-lm": synthetic_lm,
}


PRESETS: Mapping[str, RunConfig] = {
    "pysource": PYSOURCE_PRESET,
    "cifar10": RunConfig(task="cifar10", evaluation_batch=128),
}
"""Settings that suit a task, to start from; the other tasks take the defaults."""


def get_task(name: str, config: RunConfig | None = None) -> Task:
    """A task by name, with what the config says of its data; `ValueError` names the known ones."""
    require_known("task", name, TASKS)
    return TASKS[name](config or RunConfig(task=name))


def preset(name: str) -> RunConfig:
    """The settings that a task's runs start from."""
    return PRESETS.get(name, RunConfig(task=name))


__all__ = ["PRESETS", "TASKS", "Loader", "Split", "Splits", "Task", "get_task", "load_splits", "preset"]
