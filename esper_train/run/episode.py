"""Everything that one run changes, as one object; `build` makes it, `run` drives it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from esper_train.base.device import resolve_device
from esper_train.base.names import require_type
from esper_train.base.state import PlainState, RandomState, copied, no_random_numbers, tensors_of
from esper_train.base.stop import StopRequest
from esper_train.config import RunConfig
from esper_train.control.governor import Governor, weights_are_finite
from esper_train.control.policy import Decision, Idle, Policy
from esper_train.control.signals import Signals, SignalTracker
from esper_train.morph.incubation import Incubation
from esper_train.morph.model import MorphModel
from esper_train.run.cost import TrainingCost
from esper_train.run.kept import Kept
from esper_train.run.trial import Trial
from esper_train.tasks import Task
from esper_train.telemetry.hub import TelemetryHub
from esper_train.train.amp import LossScaler
from esper_train.train.learner import Learner
from esper_train.train.optimizers import OptimizerRegistry, make_optimizer, make_schedule
from esper_train.train.ranks import Ranks
from esper_train.train.sources import Source
from esper_train.train.step import TrainStep

T = TypeVar("T")
UNDONE = ("model", "optimizers", "tracker")
"""Parts of an episode that a rollback brings back."""


class SourceStates:
    """The state of the sources of a run's splits, by which it is resumed."""

    def __init__(self, **sources: Source) -> None:
        self._sources = sources

    def inexact(self) -> dict[str, str]:
        """The reason, by split, why a resumed run may get other batches than one that never
        stopped."""
        reasons = {name: source.inexact for name, source in self._sources.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def state_dict(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self._sources.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        for name, state in state_dict.items():
            self._sources[name].load_state_dict(state)


@dataclass(kw_only=True)
class Episode(PlainState):
    """Everything that one run changes; runs share none of it."""

    STATE = (
        "epoch",
        "accuracy",
        "seconds",
        "seeds_germinated",
        "decided",
        "refused",
        "contributions",
    )

    config: RunConfig
    task: Task
    model: MorphModel
    optimizers: OptimizerRegistry
    tracker: SignalTracker
    governor: Governor
    step: TrainStep
    device: torch.device
    train: Source
    validation: Source
    test: Source
    example: Any  # inputs of a batch, on the device
    steps: int  # of an epoch
    data_record: Mapping[str, Any]
    random: RandomState
    trial: Trial
    kept: Kept = field(default_factory=Kept)
    cost: TrainingCost = field(default_factory=TrainingCost)
    mode: str = "fit"
    policy: Policy = field(default_factory=Idle)
    hub: TelemetryHub = field(default_factory=TelemetryHub)
    stop: StopRequest = field(default_factory=StopRequest)
    ranks: Ranks | None = None  # where several processes train the network
    # network and example without values, by which work is counted where ranks divide the network
    outline: tuple[MorphModel, Any] | None = None
    epoch: int = 0  # finished ones
    accuracy: float = math.nan  # of the last validation, in percent
    seconds: float = 0.0
    seeds_germinated: int = 0
    # operation and reward of each epoch
    decided: list[tuple[str, float]] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)  # epoch, operation, reason
    contributions: list[float] = field(default_factory=list)  # of each fossil when it was kept
    scalers: dict[str, LossScaler] = field(default_factory=dict)  # of seeds that learn in float16
    good: Mapping[str, Any] | None = None  # a snapshot to return to, in no checkpoint

    def __post_init__(self) -> None:
        self.sources = SourceStates(train=self.train, validation=self.validation, test=self.test)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of every parameter."""
        return self.ranks is not None and self.ranks.shards is not None

    def whole(self, state: Any) -> Any:
        """A state as one process would have it; where the network is divided among ranks, all of
        them have to call this."""
        if self.ranks is None or self.ranks.shards is None:
            return state
        return self.ranks.shards.whole(state)

    def finite(self) -> bool:
        """Whether all weights and buffers are finite; where the network is divided among ranks, all
        of them have to call this."""
        weights = tensors_of(self.model.state_dict()).values()
        if self.ranks is None or self.ranks.shards is None:
            return weights_are_finite(weights)
        from esper_train.train.shards import local  # takes half as long as importing torch

        return self.ranks.shards.agree(weights_are_finite(map(local, weights)))

    def counted(self) -> tuple[MorphModel, Any]:
        """The network, with the seeds that it has now, and the batch by which its work is
        counted."""
        if self.outline is None:
            return self.model, self.example
        outline, _ = self.outline
        if outline.topology() != self.model.topology():
            outline.rebuild(self.model.topology())
        return self.outline

    def state_dict(self) -> dict[str, Any]:
        """Progress, and which seeds there are; weights, momentum and the rest have their own
        state."""
        return super().state_dict() | {
            "slots": self.model.topology(),
            "groups": list(self.optimizers.parameters()),
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        super().load_state_dict(state_dict)
        self._grow_again(state_dict)
        for name, state in state_dict["scalers"].items():
            self.scalers[name] = LossScaler(self.config.train.amp)
            self.scalers[name].load_state_dict(state)

    def stoppable(self, batches: Iterable[T]) -> Iterable[T]:
        """The batches, between which a signal may end the run. Several ranks end together instead,
        at a step or between two epochs."""
        return batches if self.ranks is not None else map(self.stop.before, batches)

    def agreed(self, measured: T) -> T:
        """The measurement; with several ranks, that of rank 0, so that all go on alike.

        Raises `Stopped` where one of the ranks was asked to stop, and `RanksDifferError` where
        their networks are not the same.
        """
        if self.ranks is None:
            return measured
        self.ranks.obey_stop()
        every = self.config.distributed.check_every
        if every and self.epoch % every == 0:
            model = self.model
            divided = self.ranks.shards is not None  # of a parameter there is only one then
            state = dict(model.named_buffers()) if divided else tensors_of(model.state_dict())
            self.ranks.require_equal(state)
        return self.ranks.from_first(measured)

    def decide(self, signals: Signals) -> Decision:
        """The policy's decision; with several ranks, that of rank 0. `TypeError` for what is no
        `Decision`."""
        if self.ranks is None:
            return self._decided(signals)
        return self.ranks.from_first(self._decided(signals) if self.ranks.first else None)

    def _decided(self, signals: Signals) -> Decision:
        decision = self.policy.decide(signals)
        hint = "to do nothing, return Decision(op=Op.WAIT)"
        require_type(decision, Decision, f"what {type(self.policy).__name__} decides", hint)
        return decision

    def learners(self) -> tuple[Learner, ...]:
        """The seeds that learn beside the network, for one epoch."""
        model = self.model
        amp = self.config.train.amp
        before = self.scalers
        self.scalers = {}
        found = []
        for name in model.learning:
            slot = model.slot(name)
            assert slot.seed is not None
            assert slot.statistics is not None
            parameters = tuple(p for p in slot.seed.parameters() if p.requires_grad)
            if not parameters:
                continue
            if amp.dtype == "float16":
                self.scalers[name] = before.get(name) or LossScaler(amp)
            learner = Learner(
                start=name,
                groups=tuple(g for g in (name, f"{name}.gate") if g in self.optimizers),
                parameters=None if self.sharded else parameters,
                buffers=(*slot.seed.buffers(), *slot.statistics.buffers()),
                scope=partial(self._incubate, name, model.incubation(name), parameters),
                scaler=self.scalers.get(name),
            )
            found.append(learner)
        return tuple(found)

    @contextmanager
    def _incubate(
        self, name: str, incubation: Incubation, parameters: tuple[nn.Parameter, ...]
    ) -> Iterator[None]:
        """Surrounds a seed's own pass, which changes neither the network nor the run's random
        numbers."""
        advice = "a captured step would repeat those of a seed: leave train.capture out"
        if self.config.train.capture:
            random = no_random_numbers(self.device, advice)
        else:
            random = self.model.streams.active(name, self.device)
        shards = None if self.ranks is None else self.ranks.shards
        alone = nullcontext() if shards is None else shards.alone(parameters)
        with incubation.entered(), random, alone:
            yield

    def snapshot(self) -> dict[str, Any]:
        """The state that `go_back` needs, on `governor.snapshot_device`."""
        state = {"episode": self.state_dict()} | {
            name: getattr(self, name).state_dict() for name in UNDONE
        }
        return copied(state, resolve_device(self.config.governor.snapshot_device))

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Restore network, seeds, optimizers and tracker. The snapshot is not changed."""
        self._grow_again(snapshot["episode"])
        for name in UNDONE:
            getattr(self, name).load_state_dict(copied(snapshot[name]))

    def _grow_again(self, state: Mapping[str, Any]) -> None:
        """Seat the same seeds, with optimizers that can take their state."""
        self.model.rebuild(state["slots"])
        for group in self.optimizers.parameters():
            self.optimizers.detach(group)
        for group in state["groups"]:  # in this order, because gradient statistics follow it
            self.attach_optimizer(group)

    def _make_optimizer(
        self, parameters: list[nn.Parameter], lr: float, group: str
    ) -> torch.optim.Optimizer:
        if self.task.make_optimizer is None:
            return make_optimizer(parameters, lr, self.config.optim)
        optimizer = self.task.make_optimizer(parameters, lr, group)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"task {self.task.name!r}: expected make_optimizer to return a torch Optimizer for "
                f"group {group!r}, got {type(optimizer).__name__}"
            )
        held = {id(p) for each in optimizer.param_groups for p in each["params"]}
        if not any(id(p) in held for p in parameters):
            raise ValueError(
                f"task {self.task.name!r}: expected make_optimizer to return an optimizer of the "
                f"parameters that it got for group {group!r}, got one that holds none of the "
                f"{len(parameters)}; make it from its first argument"
            )
        return optimizer

    def attach_optimizer(self, group: str, epoch: int = 0) -> None:
        """Give the host, the seed of a slot (group "SLOT") or its gate ("SLOT.gate") an optimizer
        of its own, with a schedule over what is left of the run after `epoch`."""
        slot, _, gate = group.partition(".")
        optim = self.config.optim
        host = self.model.host if group == "host" else None
        module = host or (self.model.slot(slot).gate if gate else self.model.slot(slot).seed)
        parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        shards = None if self.ranks is None else self.ranks.shards
        if shards is not None:
            parameters = [shards.part(p) for p in parameters]
        if not parameters:
            self.optimizers.attach(group, None)
            return
        lr = optim.host_lr if host else optim.seed_lr
        optimizer = self._make_optimizer(parameters, lr, group)
        if shards is not None:
            shards.follow(optimizer)
        left = max(1, self.config.max_epochs - epoch) * (
            self.steps if optim.schedule.each == "step" else 1
        )
        self.optimizers.attach(group, optimizer, make_schedule(optimizer, optim.schedule, left))
