"""Makes everything a run owns, and refuses here whatever could not work later. `run` and `profile`
call it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper_train.base.device import plain_defaults, resolve_device
from esper_train.base.modes import evaluating
from esper_train.base.state import RandomState, seeded
from esper_train.config import RunConfig
from esper_train.control.governor import Governor
from esper_train.control.signals import SignalTracker
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.host import Host, check_host
from esper_train.morph.model import MorphModel
from esper_train.run.episode import Episode
from esper_train.run.trial import Trial
from esper_train.tasks import Splits, Task, get_task, load_splits, new_host, registry_of
from esper_train.train.batches import changed, moved, read_batch
from esper_train.train.capture import Capture, CudaGraphs
from esper_train.train.data import Data
from esper_train.train.forward import call, logits_of
from esper_train.train.loss import Loss, criterion_options
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.ranks import Ranks, ranks_of
from esper_train.train.sources import ReadSource, Source, make_source
from esper_train.train.step import TrainStep, build_train_step

if TYPE_CHECKING:  # importing it takes half as long as importing torch
    from esper_train.train.shards import Shards


def build_episode(
    config: RunConfig,
    *,
    task: Task | None = None,
    slots: Sequence[str],
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """Make everything a run owns. Raises `ValueError` for settings or data that cannot work."""
    if task is None:
        task = get_task(config.task, config.task_config())
    config = replace(config, task=task.name)
    ranks = ranks_of(config.distributed)
    device = resolve_device(config.device)
    resolve_device(config.governor.snapshot_device)
    with seeded(config.seed), plain_defaults():  # a task may draw samples, and loaders seeds
        splits = load_data(config, task)
    order = torch.Generator().manual_seed(config.seed)
    step = _step(config, task, device, grows=bool(slots))

    def source(data: Data, batch_size: int) -> Source:
        made = make_source(data, batch_size, device=device, workers=config.workers)
        return made if task.batch is None else ReadSource(made, device, read=task.batch)

    train = _training_source(config, task, splits.train, order, device, ranks)
    example = _example(train, config.batch_size, device)
    host = _host(config, task, device, example)
    registry = registry_of(task, registry)
    model = MorphModel(host, slots, growth=config.growth, seed=config.seed, registry=registry)
    for slot in model.seed_slots:
        registry.check(host.topology, slot, host.slot_channels[slot])
    episode = Episode(
        config=config,
        task=task,
        model=model,
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
        random=RandomState(
            config.seed + 1 if ranks is None else ranks.seed(config.seed + 1), device, order
        ),
        ranks=ranks,
    )
    if ranks is not None:
        ranks.copy_first([*model.parameters(), *model.buffers()])
        if config.distributed.strategy == "fsdp2":
            if slots:
                episode.outline = _outline(model, example)
            ranks.shards = _divided(model)
        for seated in model.slots:
            seated.arrange = partial(_arrange, ranks)
    episode.attach_optimizer("host")
    return episode


def load_data(config: RunConfig, task: Task) -> Splits:
    """A task's data, as `load_splits` checks them; what its criterion ignores is no bad target."""
    return load_splits(task, Loss(task.task_type, config.train, task.criterion).ignored)


def _divided(model: MorphModel) -> "Shards":
    """Divide the network among the ranks. `ValueError` where it, or a seed that it could be given,
    cannot be divided."""
    # takes half as long as importing torch
    from esper_train.train.shards import Shards, require_rows

    topology = model.host.topology
    with torch.device("meta"):
        for slot in model.slots:
            for name in model.registry.names(topology):
                require_rows(model.registry.require(topology, name).build(slot.channels))
    blocks = [*model.host.segments.values(), model.host.head]
    return Shards(model, blocks, ("forward_feeding", "forward_keeping"))


def _arrange(ranks: Ranks, module: nn.Module, stays: bool) -> None:
    """Give a new seed or gate the weights of rank 0, if they are to stay, and divide it where the
    network is divided."""
    if stays:
        ranks.copy_first([*module.parameters(), *module.buffers()])
    if ranks.shards is not None:
        ranks.shards.add(module)


def _outline(model: MorphModel, example: Any) -> tuple[MorphModel, Any]:
    """Copies of the network and of a batch that have shapes and no values, on the meta device.
    `ValueError` for a host that does not run there."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    outline = copy.deepcopy(model, memo)
    inputs = changed(example, lambda x: x.to("meta"))
    try:
        with torch.no_grad():
            call(outline, inputs, {})
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            "with distributed.strategy 'fsdp2', the work of a growing network is counted on the "
            f"meta device, on which this host does not run ({error}); use 'ddp'"
        ) from error
    return outline, inputs


def _step(config: RunConfig, task: Task, device: torch.device, *, grows: bool) -> TrainStep:
    step = build_train_step(task.task_type, config.train, task.criterion, forward=task.forward)
    if grows and not step.loss.counts:
        raise ValueError(
            f"seeds are judged by accuracy, which task {task.name!r} of type {task.task_type!r} "
            "has not; train its host alone, with run_fit, or `esper-train fit`"
        )
    if step.loss.own is not None and config.distributed.strategy == "fsdp2":
        raise ValueError(
            "distributed.strategy 'fsdp2' needs cross entropy as the loss, got a criterion of "
            "one's own; use 'ddp'"
        )
    if grows and task.forward is not None:
        raise ValueError(
            f"seeds learn by passes of the host's own forward, got forward={task.forward!r} from "
            f"task {task.name!r}; write it into the host's segments, or train the host alone, with "
            "run_fit, or `esper-train fit`"
        )
    step.backend(device)  # a backend that cannot be used is refused here, not at the first batch
    if config.train.capture:
        step.capture = Capture(CudaGraphs(device))
    return step


def _training_source(
    config: RunConfig,
    task: Task,
    data: Data,
    order: torch.Generator,
    device: torch.device,
    ranks: Ranks | None,
) -> Source:
    source = make_source(
        data,
        config.batch_size,
        shuffle=order,
        device=device,
        workers=config.workers,
        share=None if ranks is None else ranks.share,
    )
    if task.batch is None and task.augment is None:
        return source
    return ReadSource(source, device, read=task.batch, augment=task.augment)


def _example(source: Source, rows: int, device: torch.device) -> Any:
    """Inputs of a training batch."""
    with plain_defaults():
        inputs, _ = read_batch(source.example())
    return moved(changed(inputs, lambda x: x[:rows] if x.dim() else x), device)


def _host(config: RunConfig, task: Task, device: torch.device, example: Any) -> Host:
    """The host on its device, after a batch of zeros went through it."""
    zeros = changed(example, lambda x: torch.zeros_like(x[:2] if x.dim() else x))
    with RandomState(config.seed, device).active(), plain_defaults():
        host = new_host(task, config.host).to(device)
        if task.forward is None:
            logits = logits_of(call(partial(check_host, host), zeros, {}))
        else:
            with evaluating(host), torch.no_grad():
                logits = logits_of(task.forward(host, zeros))
    if _channels_last(config, host, device):
        host.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = task.num_classes
    if classes is not None:
        found = logits.shape[1 if task.task_type == "dense" else -1]
        if found < classes:
            raise ValueError(
                f"task {task.name!r} has num_classes={classes}, but its host gives logits "
                f"{list(logits.shape)}, for {found} classes; change one of them"
            )
    return host


def _guess_loss(config: RunConfig, task: Task) -> float:
    """The loss of a random guess, in nats; 0 where it is not known: then only a run's own losses
    judge it."""
    known = criterion_options(task.criterion) is not None
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
    known = list(filter(None, (length, config.max_batches)))
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
    """The choice of the config, or else whether convolutions gain from channels-last: on CPUs they
    take half the time from 16 channels on, and a fifth more below."""
    if config.channels_last is not None:
        return config.channels_last
    if config.distributed.strategy == "fsdp2":
        return False
    if device.type == "cuda":
        return config.train.amp.dtype is not None
    return (
        min((m.out_channels for m in host.modules() if isinstance(m, nn.Conv2d)), default=0) >= 16
    )
