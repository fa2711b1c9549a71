"""Makes everything a run owns, and refuses here whatever could not work later. `episode` and `cli`
call it."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from esper_train.base.device import plain_defaults, resolve_device
from esper_train.base.state import RandomState
from esper_train.config import RunConfig
from esper_train.control.governor import Governor
from esper_train.control.signals import SignalTracker
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.run.episode import Episode
from esper_train.run.trial import Trial
from esper_train.tasks import Task, get_task, load_splits
from esper_train.train.capture import Capture, CudaGraphs
from esper_train.train.data import Loader, Split
from esper_train.train.optimizers import OptimizerRegistry
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
    task = task or get_task(config.task, config.task_config())
    device = resolve_device(config.device)
    resolve_device(config.governor.snapshot_device)
    with plain_defaults():
        splits = load_splits(task)
    order = torch.Generator().manual_seed(config.seed)
    with RandomState(config.seed, device).active(), plain_defaults():
        host = task.build_host(config.host).to(device)
    if _channels_last(config, host, device):
        host.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = build_train_step(task.task_type, config.train)
    step.backend(device)  # refuses here, not at the first batch, what cannot serve
    if config.train.capture:
        step.capture = Capture(CudaGraphs(device))

    def loader(split: Split, batch_size: int, shuffle: torch.Generator | None = None) -> Loader:
        return Loader(split, batch_size, shuffle=shuffle, device=device, workers=config.workers)

    train = loader(splits.train, config.batch_size, shuffle=order)
    batches = min(len(train), config.max_batches or len(train))
    episode = Episode(
        config=config,
        task=task,
        model=MorphModel(host, slots, growth=config.growth, seed=config.seed, registry=registry),
        optimizers=OptimizerRegistry(schedule_each=config.optim.schedule.each),
        tracker=SignalTracker(plateau_threshold=config.policy.plateau_threshold),
        trial=Trial(config.growth),
        governor=Governor(config.governor, math.log(task.num_classes)),
        step=step,
        device=next(host.parameters()).device,
        train=train,
        validation=loader(splits.validation, config.evaluation_batch),
        test=loader(splits.test, config.evaluation_batch),
        example=splits.train[0][: config.batch_size].to(device),
        steps=math.ceil(batches / config.train.accumulate),
        data_record=splits.record,
        random=RandomState(config.seed + 1, device, order),
    )
    episode.attach_optimizer("host")
    return episode


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
