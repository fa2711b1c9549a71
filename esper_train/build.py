"""Makes everything a run owns, and refuses here whatever could not work later. `episode` and `cli` call it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from esper_train.capture import Capture, CudaGraphs
from esper_train.config import OptimConfig, RunConfig, ScheduleConfig
from esper_train.control.governor import Governor
from esper_train.control.policy import Idle, Policy
from esper_train.control.signals import SignalTracker
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.optimizers import OptimizerRegistry
from esper_train.state import PlainState, RandomState, copied
from esper_train.step import TrainStep, build_train_step
from esper_train.stop import StopRequest
from esper_train.tasks import Loader, Task, get_task, load_splits
from esper_train.telemetry.hub import TelemetryHub

UNDONE = ("model", "optimizers", "tracker")
"""Parts of an episode that a rollback brings back."""


@dataclass(kw_only=True)
class Episode(PlainState):
    """Everything one run changes, and nothing another run can see."""

    STATE = ("epoch", "accuracy", "seconds", "seeds_germinated", "decided", "contributions")

    config: RunConfig
    task: Task
    model: MorphModel
    optimizers: OptimizerRegistry
    tracker: SignalTracker
    governor: Governor
    step: TrainStep
    device: torch.device
    train: Loader
    validation: Loader
    test: Loader
    steps: int  # of an epoch
    data_record: Mapping[str, Any]
    random: RandomState
    mode: str = "fit"
    policy: Policy = field(default_factory=Idle)
    hub: TelemetryHub = field(default_factory=TelemetryHub)
    stop: StopRequest = field(default_factory=StopRequest)
    epoch: int = 0  # finished ones
    accuracy: float = math.nan  # of the last validation, in percent
    seconds: float = 0.0
    seeds_germinated: int = 0
    decided: list[tuple[str, float]] = field(default_factory=list)  # operation and reward of each epoch
    contributions: list[float] = field(default_factory=list)  # of each fossil when it was kept
    good: Mapping[str, Any] | None = None  # a snapshot to return to, in no checkpoint

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come, and what grew; weights, momentum and the rest have their own state."""
        return super().state_dict() | {"slots": self.model.topology(), "groups": list(self.optimizers.parameters())}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        super().load_state_dict(state_dict)
        self._grow_again(state_dict)

    def snapshot(self) -> dict[str, Any]:
        """What `go_back` needs, on `governor.snapshot_device`."""
        state = {"episode": self.state_dict()} | {name: getattr(self, name).state_dict() for name in UNDONE}
        return copied(state, resolve_device(self.config.governor.snapshot_device))

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Network, seeds, optimizers and tracker as they were. The snapshot stays as it is."""
        self._grow_again(snapshot["episode"])
        for name in UNDONE:
            getattr(self, name).load_state_dict(copied(snapshot[name]))

    def _grow_again(self, state: Mapping[str, Any]) -> None:
        """Seat the same seeds, with optimizers that can take their state."""
        self.model.rebuild(state["slots"])
        for group in self.optimizers.parameters():
            self.optimizers.detach(group)
        for group in state["groups"]:  # in their order, which is that of the gradient statistics
            self.attach_optimizer(group)

    def attach_optimizer(self, group: str, epoch: int = 0) -> None:
        """Give the host, the seed of a slot (group "SLOT") or its gate ("SLOT.gate") an optimizer of its own, with a
        schedule over what is left of the run after `epoch`."""
        slot, _, gate = group.partition(".")
        optim, host = self.config.optim, self.model.host if group == "host" else None
        module = host or (self.model.slot(slot).gate if gate else self.model.slot(slot).seed)
        parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            self.optimizers.attach(group, None)
            return
        optimizer = make_optimizer(parameters, optim.host_lr if host else optim.seed_lr, optim)
        left = max(1, self.config.max_epochs - epoch) * (self.steps if optim.schedule.each == "step" else 1)
        self.optimizers.attach(group, optimizer, make_schedule(optimizer, optim.schedule, left))


def build_episode(
    config: RunConfig, *, task: Task | None = None, slots: Sequence[str], registry: BlueprintRegistry | None = None
) -> Episode:
    """Make everything a run owns. Raises `ValueError` for whatever in the config or the data cannot work."""
    task = task or get_task(config.task, config)
    device, policy = resolve_device(config.device), config.policy
    resolve_device(config.governor.snapshot_device)
    splits = load_splits(task)
    order = torch.Generator().manual_seed(config.seed)
    with RandomState(config.seed, device).active():
        host = task.build_host(config.host).to(device)
    if _channels_last(config, host, device):
        host.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = build_train_step(task.task_type, config.train)
    where: dict[str, Any] = {"device": device, "workers": config.workers}
    step.backend(device)  # refuses here, not at the first batch, what cannot serve
    if config.train.capture:
        step.capture = Capture(CudaGraphs(device))
    train = Loader(splits.train, config.batch_size, shuffle=order, **where)
    batches = min(len(train), config.max_batches or len(train))
    episode = Episode(
        config=config,
        task=task,
        model=MorphModel(host, slots, growth=config.growth, max_epochs=config.max_epochs, registry=registry),
        optimizers=OptimizerRegistry(schedule_each=config.optim.schedule.each),
        tracker=SignalTracker(plateau_threshold=policy.plateau_threshold, plateau_epochs=policy.plateau_epochs),
        governor=Governor(config.governor, math.log(task.num_classes)),
        step=step,
        device=next(host.parameters()).device,
        train=train,
        validation=Loader(splits.validation, config.evaluation_batch, **where),
        test=Loader(splits.test, config.evaluation_batch, **where),
        steps=math.ceil(batches / config.train.accumulate),
        data_record=splits.record,
        random=RandomState(config.seed + 1, device, order),
    )
    episode.attach_optimizer("host")
    return episode


def make_optimizer(parameters: Sequence[Tensor], lr: float, config: OptimConfig) -> Optimizer:
    """The optimizer of the host or of one seed, fused where torch has that: a quarter of the time, on CPUs too."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.kind == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=config.weight_decay, fused=fused)
    return SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, total: int) -> LRScheduler | None:
    """The schedule over `total` changes of the rate; None for a constant one."""
    lr = optimizer.defaults["lr"]
    if config.kind == "cosine":
        return CosineAnnealingLR(optimizer, total, eta_min=config.final * lr)
    if config.kind == "onecycle":
        return OneCycleLR(optimizer, lr, total + 1, pct_start=config.warmup, cycle_momentum=False)
    return None


def _channels_last(config: RunConfig, host: nn.Module, device: torch.device) -> bool:
    """What the config says, or whether convolutions gain by it: on CPUs half the time from 16 channels on, and a fifth
    more below."""
    if config.channels_last is not None:
        return config.channels_last
    if device.type == "cuda":
        return config.train.amp.dtype is not None
    return min((m.out_channels for m in host.modules() if isinstance(m, nn.Conv2d)), default=0) >= 16


def resolve_device(name: str) -> torch.device:
    """The torch device of this name; `ValueError` if it is none or cannot be used here."""
    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        usable += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} names no device; usable here: {', '.join(usable)}") from error
    if f"{device.type}:{device.index or 0}" not in ("cpu:0", *usable):
        raise ValueError(f"device {name!r} is not there; usable here: {', '.join(usable)}")
    return device
