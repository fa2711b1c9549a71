"""Data that several hosts train on, loaded once."""

from dataclasses import replace

import torch

from esper_train.base.device import plain_defaults, resolve_device
from esper_train.config import RunConfig
from esper_train.run.build import load_data
from esper_train.tasks import Task
from esper_train.train.data import Split, is_pair_of_tensors


def shared(task: Task, config: RunConfig) -> Task:
    """The task with its data loaded, and on the device if they take at most half of what is free
    there. Data that are not tensors are loaded for each run, because a loader has a state."""
    with plain_defaults():
        splits = load_data(config, task)
    parts: list[Split] = []
    for part in (splits.train, splits.validation, splits.test):
        if not is_pair_of_tensors(part):
            return task
        parts.append(part)
    device = resolve_device(config.device)
    size = sum(inputs.nbytes + targets.nbytes for inputs, targets in parts)
    on_cuda = device.type == "cuda" and not config.workers
    if on_cuda and size <= torch.cuda.mem_get_info(device)[0] // 2:
        train, validation, test = (
            (inputs.to(device), targets.to(device)) for inputs, targets in parts
        )
        splits = replace(splits, train=train, validation=validation, test=test)
    return replace(task, load=lambda: splits)
