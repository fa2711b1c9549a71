"""Tasks written by users, found by where they are defined: MODULE:NAME on the command line."""

import importlib
import importlib.util
import os
import sys

from esper_train.tasks.task import Task


def is_place(name: str) -> bool:
    """Whether a task is named by its place, MODULE:NAME; a task's own name has no colon."""
    return ":" in name


def import_task(place: str) -> Task:
    """The task at MODULE:NAME; the working directory is searched first, as `python -m` does.

    Only for names that the user typed, never for those in a run directory. Raises `ValueError`
    where there is no such module or name, and `TypeError` where it is no `Task`.
    """
    module_name, _, name = place.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # and stays there, for worker processes
    top = module_name.partition(".")[0]
    if not top or importlib.util.find_spec(top) is None:
        raise ValueError(
            f"task {place!r}: there is no module {top!r} in {here} or among the installed "
            "packages; write MODULE:NAME, as in my_tasks:task"
        )
    module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    if found is None:
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        known = ", ".join(tasks) or "none"
        raise ValueError(f"task {place!r}: {module_name} has no {name!r}; tasks in it: {known}")
    if not isinstance(found, Task):
        raise TypeError(f"task {place!r}: expected a Task, got {type(found).__name__}")
    return found
