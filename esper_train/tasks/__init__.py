"""The tasks that `esper-train --task` knows by name."""

from collections.abc import Callable, Mapping

from esper_train.base.names import require_known, require_type
from esper_train.tasks.cifar10 import cifar10
from esper_train.tasks.config import PRESETS, TaskConfig
from esper_train.tasks.digits import digits
from esper_train.tasks.own import import_task, is_place
from esper_train.tasks.pysource import pysource
from esper_train.tasks.synthetic import synthetic, synthetic_lm
from esper_train.tasks.task import Splits, Task, load_splits, new_host, registry_of
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
    require_type(config, TaskConfig, "config", or_none=True)
    return TASKS[name](config or TaskConfig())


def task_of_run(name: str, config: TaskConfig, given: Task | None) -> Task:
    """The task of a run directory, which records only its name: a task of the package, or the one
    that the caller passes again.

    Raises `ValueError` where a task of one's own is not given, or has another name.
    """
    if given is None and name not in TASKS:
        raise ValueError(
            f"the run is of a task of your own, {name!r}; give it again, as task=... or on the "
            "command line as --task MODULE:NAME"
        )
    if given is not None and given.name != name:
        raise ValueError(f"the run is of task {name!r}, got task {given.name!r}; give it {name!r}")
    return given or get_task(name, config)


__all__ = [
    "PRESETS",
    "TASKS",
    "Split",
    "Splits",
    "Task",
    "TaskConfig",
    "get_task",
    "import_task",
    "is_place",
    "load_splits",
    "new_host",
    "registry_of",
    "task_of_run",
]
