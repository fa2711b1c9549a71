"""Makes everything a run owns, and refuses here whatever could not work later. `run` and `profile`
call it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper_train.base.device import plain_defaults, resolve_device
from esper_train.base.state import RandomState
from esper_train.config import RunConfig
from esper_train.control.governor import Governor
from esper_train.control.signals import SignalTracker
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.host import Host, check_host
from esper_train.morph.model import MorphModel
from esper_train.run.episode import Episode
from esper_train.run.trial import Trial
from esper_train.tasks import Task, get_task, load_splits, registry_of
from esper_train.train.capture import Capture, CudaGraphs
from esper_train.train.data import Data
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.sources import AugmentedSource, Source, make_source, on_device
from esper_train.train.step import build_train_step


def build_episode(
    config: RunConfig,
    *,
    task: Task | None = None,
    slots: Sequence[str],
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """Make everything a run owns. Raises `ValueError` for whatever in the config or the data cannot
    work."""
    if task is None:
        task = get_task(config.task, config.task_config())
    config = replace(config, task=task.name)
    device = resolve_device(config.device)
    resolve_device(config.governor.snapshot_device)
    with plain_defaults():
        splits = load_splits(task)
    order = torch.Generator().manual_seed(config.seed)
    step = build_train_step(task.task_type, config.train, task.criterion)
    step.backend(device)  # refuses here, not at the first batch, what cannot serve
    if config.train.capture:
        step.capture = Capture(CudaGraphs(device))

    def source(data: Data, batch_size: int, shuffle: torch.Generator | None = None) -> Source:
        return make_source(data, batch_size, shuffle=shuffle, device=device, workers=config.workers)

    train = source(splits.train, config.batch_size, order)
    example = _example(train, config.batch_size, device)
    if task.augment is not None:
        train = AugmentedSource(train, task.augment, device)
    host = _host(config, task, device, example)
    episode = Episode(
        config=config,
        task=task,
        model=MorphModel(
            host,
            slots,
            growth=config.growth,
            seed=config.seed,
            registry=registry_of(task, registry),
        ),
        optimizers=OptimizerRegistry(schedule_each=config.optim.schedule.each),
        tracker=SignalTracker(plateau_threshold=config.policy.plateau_threshold),
        trial=Trial(config.growth),
        governor=Governor(config.governor, _guess_loss(config, task)),
        step=step,
        device=next(host.parameters()).device,
        train=train,
        validation=source(splits.validation, config.evaluation_batch),
        test=source(splits.test, config.evaluation_batch),
        example=example,
        steps=_steps(config, train.length()),
        data_record=splits.record,
        random=RandomState(config.seed + 1, device, order),
    )
    episode.attach_optimizer("host")
    return episode


def _example(source: Source, rows: int, device: torch.device) -> Any:
    """Inputs of a training batch."""
    with plain_defaults():
        inputs, _ = source.example()
    return tree_map_only(Tensor, lambda part: part[:rows], on_device(inputs, device))


def _host(config: RunConfig, task: Task, device: torch.device, example: Any) -> Host:
    """The host on its device, after a batch of zeros went through it."""
    with RandomState(config.seed, device).active(), plain_defaults():
        host = task.build_host(config.host).to(device)
        zeros = tree_map_only(Tensor, lambda part: torch.zeros_like(part[:2]), example)
        logits = check_host(host, zeros)
    if _channels_last(config, host, device):
        host.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = task.num_classes
    if classes is not None and isinstance(logits, Tensor):
        found = logits.shape[1 if task.task_type == "dense" else -1]
        if found < classes:
            raise ValueError(
                f"task {task.name!r} has num_classes={classes}, but its host gives logits "
                f"{list(logits.shape)}, for {found} classes; change one of them"
            )
    return host


def _guess_loss(config: RunConfig, task: Task) -> float:
    """The loss of guessing, in nats; 0 where it is not known, so that a run is judged by its own
    losses alone."""
    known = task.criterion is None or isinstance(task.criterion, nn.CrossEntropyLoss)
    if task.num_classes is not None and known:
        return math.log(task.num_classes)
    if config.reward == "loss":
        raise ValueError(
            "reward 'loss' compares with the loss of guessing, which is not known for a criterion "
            "of one's own; use 'shaped', 'sparse' or 'minimal'"
        )
    return 0.0


def _steps(config: RunConfig, length: int | None) -> int:
    """Optimizer steps per epoch, for schedules that advance with each."""
    known = [count for count in (length, config.max_batches) if count is not None]
    if known:
        return math.ceil(min(known) / config.train.accumulate)
    schedule = config.optim.schedule
    if schedule.kind != "constant" and schedule.each == "step":
        raise ValueError(
            f"schedule {schedule.kind!r} needs the number of steps in an epoch, and the training "
            "loader has no length; set max_batches, or optim.schedule.each = 'epoch'"
        )
    return 1


def _channels_last(config: RunConfig, host: nn.Module, device: torch.device) -> bool:
    """What the config says, or whether convolutions gain by it: on CPUs half the time from 16
    channels on, and a fifth more below."""
    if config.channels_last is not None:
        return config.channels_last
    if device.type == "cuda":
        return config.train.amp.dtype is not None
    return (
        min((m.out_channels for m in host.modules() if isinstance(m, nn.Conv2d)), default=0) >= 16
    )
