"""One optimizer per group: the host's, and one for each slot, attached and detached as seeds come
and go."""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from esper_train.base.names import require_known
from esper_train.base.state import copied
from esper_train.train.config import OptimConfig, ScheduleConfig


class OptimizerRegistry:
    """Optimizers by group name, each with its schedule, if any. `schedule_each` says when these
    step: after each "step" or "epoch". Attaching or detaching one leaves the state (momentum) of
    the others alone."""

    def __init__(self, *, schedule_each: str = "step", **optimizers: Optimizer) -> None:
        self._optimizers: dict[str, Optimizer | None] = {}
        self._schedules: dict[str, LRScheduler] = {}
        require_known("schedule_each", schedule_each, ("step", "epoch"))
        self._schedule_each = schedule_each
        for group, optimizer in optimizers.items():
            self.attach(group, optimizer)

    def attach(
        self, group: str, optimizer: Optimizer | None, schedule: LRScheduler | None = None
    ) -> None:
        """Add a group; None stands for one without parameters. `TypeError` for anything else that
        is no `Optimizer`, `ValueError` if the name is taken, or for an optimizer that cannot step
        without a closure."""
        if group in self._optimizers:
            raise ValueError(f"group {group!r} has an optimizer already; detach it first")
        if not isinstance(optimizer, (Optimizer, NoneType)):
            raise TypeError(
                f"group {group!r}: expected a torch.optim.Optimizer or None, got a "
                f"{type(optimizer).__name__}; several optimizers need a group each"
            )
        if optimizer is not None and _needs_closure(optimizer):
            raise ValueError(
                "expected an optimizer whose step() needs no closure, got "
                f"{type(optimizer).__name__}, which computes the loss several times per step; use "
                "another, such as AdamW, or call it in a loop of your own with "
                "esper_kernels.cross_entropy as the loss"
            )
        self._optimizers[group] = optimizer
        if schedule is not None:
            self._schedules[group] = schedule

    def detach(self, group: str) -> None:
        """Forget a group. `ValueError` if there is none of this name."""
        if group not in self._optimizers:
            raise ValueError(
                f"no group {group!r}; attached are {', '.join(self._optimizers) or 'none'}"
            )
        del self._optimizers[group]
        self._schedules.pop(group, None)

    def __contains__(self, group: str) -> bool:
        return group in self._optimizers

    def parameters(self) -> dict[str, list[Tensor]]:
        """Group name to its parameters, in the optimizer's order."""
        return {
            group: []
            if optimizer is None
            else [p for g in optimizer.param_groups for p in g["params"]]
            for group, optimizer in self._optimizers.items()
        }

    def require_parameters_of(self, model: nn.Module) -> None:
        """`ValueError` where a step would change nothing of the model, as where the model was made
        again and its optimizer was not."""
        learning = [p for p in model.parameters() if p.requires_grad]
        held = {id(p) for members in self.parameters().values() for p in members}
        if learning and not any(id(p) in held for p in learning):
            raise ValueError(
                "expected an optimizer of the model's parameters, got none that holds any of the "
                f"{len(learning)} that require grad; make it from model.parameters() of this model"
            )

    def present(self, groups: Collection[str] | None = None) -> list[Optimizer]:
        """The optimizers there are, in the order of attachment; of these groups, where given."""
        return [
            optimizer
            for group, optimizer in self._optimizers.items()
            if optimizer is not None and (groups is None or group in groups)
        ]

    def step(self, groups: Collection[str] | None = None) -> None:
        """One step of every optimizer, or of those of some groups."""
        for group, optimizer in self._optimizers.items():
            if optimizer is not None and (groups is None or group in groups):
                optimizer.step()

    def step_unless(
        self, skip: Tensor, grad_scale: Tensor | None = None, groups: Collection[str] | None = None
    ) -> None:
        """A step of every optimizer, or of those of some groups, on gradients divided by
        `grad_scale` (float32 [], None: 1), that changes no bit where `skip` (float32 []) is 1:
        decided on the device.

        `ValueError` for an optimizer that cannot leave a step out by itself.
        """
        for optimizer in self.present(groups):
            # The promise that torch's own loss scaler asks for. A restored state may have taken the
            # setting away.
            promised = getattr(optimizer, "_step_supports_amp_scaling", False)
            fused = all(g.get("fused") and not g.get("dampening") for g in optimizer.param_groups)
            if not promised or not fused:
                raise ValueError(
                    "to skip a step without a host sync, expected an optimizer made with "
                    f"fused=True and without dampening, got {type(optimizer).__name__}; make it "
                    "so, or use another train.on_bad_numbers, and no float16"
                )
            if isinstance(optimizer, SGD):
                _start_momentum(optimizer)
            optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def advance(self, each: str) -> None:
        """Step the schedules after a "step" or an "epoch", if `schedule_each` says so; a finished
        one stays at its end."""
        if each == self._schedule_each:
            for schedule in self._schedules.values():
                if schedule.last_epoch < _length(schedule):
                    schedule.step()

    def fit_schedules(self, config: ScheduleConfig, left: int) -> None:
        """Let every schedule end after `left` more changes of the rate.

        For a run that is resumed with another length: its rates are then those of a schedule that
        had this length from the start.
        """
        for group, schedule in self._schedules.items():
            done = schedule.last_epoch
            if done + left != _length(schedule):
                fitted = make_schedule(schedule.optimizer, config, done + left, done)
                assert fitted is not None
                self._schedules[group] = fitted

    def state_dict(self) -> dict[str, Any]:
        """State of every optimizer by group, that of its schedule under "schedule"."""
        states: dict[str, Any] = {
            group: o and o.state_dict() for group, o in self._optimizers.items()
        }
        for group, schedule in self._schedules.items():
            states[group]["schedule"] = schedule.state_dict()
        return states

    def return_momentum(self, group: str, state: Mapping[str, Any]) -> None:
        """Restore what a group's optimizer knew of its parameters in an earlier `state_dict`;
        learning rates and schedules stay as they are."""
        optimizer = self._optimizers[group]
        if optimizer is not None:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copied(state["state"]), "param_groups": groups})

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the same groups must be attached."""
        if set(states) != set(self._optimizers):
            raise ValueError(
                f"expected state for the groups {list(self._optimizers)}, got {list(states)}"
            )
        for group, optimizer in self._optimizers.items():
            if optimizer is not None:
                optimizer.load_state_dict(states[group])
        for group, schedule in self._schedules.items():
            schedule.load_state_dict(states[group]["schedule"])


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` has an argument that must be given, as that of LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _start_momentum(optimizer: SGD) -> None:
    """Momentum of 0 instead of none: torch's fused SGD leaves it uninitialised where its first step
    is skipped."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def make_optimizer(parameters: Sequence[Tensor], lr: float, config: OptimConfig) -> Optimizer:
    """The optimizer of the host or of one seed, fused where torch has that: a quarter of the time,
    on CPUs too."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.kind == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=config.weight_decay, fused=fused)
    return SGD(
        parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
    )


def make_schedule(
    optimizer: Optimizer, config: ScheduleConfig, total: int, done: int = 0
) -> LRScheduler | None:
    """The schedule over `total` changes of the rate, after `done` of them; None for a constant
    rate.

    With `done`, the optimizer must have had a schedule of this kind before.
    """
    lr = optimizer.defaults["lr"]
    last = done - 1  # making a schedule takes one step of it
    if config.kind == "cosine":
        cosine = CosineAnnealingLR(optimizer, total, eta_min=config.final * lr, last_epoch=last)
        if done:  # torch computes each rate from the one before, which came from another schedule
            cosine._last_lr = cosine._get_closed_form_lr()
            for group, rate in zip(optimizer.param_groups, cosine._last_lr, strict=True):
                group["lr"] = rate
        return cosine
    if config.kind == "onecycle":
        return OneCycleLR(
            optimizer,
            lr,
            total + 1,
            pct_start=config.warmup,
            cycle_momentum=False,
            last_epoch=last,
        )
    return None


def _length(schedule: LRScheduler) -> float:
    """Changes of the rate until the schedule's end."""
    if isinstance(schedule, CosineAnnealingLR):
        return schedule.T_max
    if isinstance(schedule, OneCycleLR):
        return schedule.total_steps - 1
    return math.inf
