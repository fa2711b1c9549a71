"""A slot: the place after a host segment where a seed is seated, trained, blended in, kept or
removed.

`model` calls `forward`; `run` calls `germinate`, `observe`, `step_epoch`, `fossilize` and `cull`.
Each of these returns the `StageChange`s that it made, from which the caller attaches optimizers and
writes events.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esper_train.base.device import plain_defaults
from esper_train.morph.blending import Gate, get_blend
from esper_train.morph.blueprints import Blueprint
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import GateResult, judge
from esper_train.morph.incubation import Statistics
from esper_train.morph.lifecycle import (
    TRANSITIONS,
    TRIAL,
    Measurement,
    RefusedError,
    SeedStage,
    SlotState,
    StageChange,
)

_Module = TypeVar("_Module", bound=nn.Module)
Arrange = Callable[[nn.Module, bool], None]
"""Takes a new module, and whether its initial weights will stay, because none are restored."""
PARTS: Mapping[SeedStage, str] = {
    SeedStage.TRAINING: "learns",
    SeedStage.BLENDING: "blends",
    SeedStage.PROBATIONARY: "acts",
    SeedStage.FOSSILIZED: "acts",
}
"""Stage to the part the seed has in `forward`; in any other stage it has none."""


class SeedSlot(nn.Module):
    """Holds at most one seed. `state` is a frozen record of the seed's life, replaced at each
    change."""

    def __init__(self, slot: str, channels: int, growth: GrowthConfig) -> None:
        super().__init__()
        self.channels = channels
        self.growth = growth
        self.seed: nn.Module | None = None
        self.gate: Gate | None = None
        """The gate of a seed with the blend "gated", until alpha is 1."""
        self.statistics: Statistics | None = None
        """Statistics of the batch norms behind the slot, if its seed learns beside the network."""
        self.arrange: Arrange | None = None
        """Called with each new seed or gate before it is seated, where there are several
        processes."""
        self.state = SlotState(slot=slot)
        # a tensor, so that torch.compile does not recompile for a new value
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.alpha: Tensor

    def forward(self, x: Tensor, alpha: float | None = None) -> Tensor:
        """Features in, features out, same shape. `alpha` overrides the slot's own for this call; 0
        is "no seed".

        In TRAINING the value is x. A seed that learns beside the network is called under alpha 1;
        with `incubation` "straight_through" it receives the full gradient of the slot's output
        here, and sends none into the host with `isolate_training`.
        """
        part = self.part
        if self.seed is None or alpha == 0.0 or part == "none":
            return x
        if alpha is not None:
            z = self.seed(_plain(x))
            return z if alpha == 1.0 else torch.lerp(x, z, x.new_tensor(alpha))
        if part == "learns":
            if self.growth.incubation == "closed" or not torch.is_grad_enabled():
                return x
            return _StraightThrough.apply(
                x, self.seed(_plain(x.detach() if self.growth.isolate_training else x))
            )
        z = self.seed(_plain(x))
        if part == "acts":
            return z
        weight = self.alpha if self.gate is None else self.gate(x, self.alpha)
        return torch.lerp(x, z, weight.to(x.dtype))

    @property
    def state(self) -> SlotState:
        """The seed's place in its life. `forward` reads only `part`, so that a new record does not
        recompile it."""
        return self._state

    @state.setter
    def state(self, state: SlotState) -> None:
        self._state = state
        self.part = PARTS.get(state.stage, "none")

    def germinate(
        self, blueprint: Blueprint, seed_id: str, blend: str = "sigmoid"
    ) -> list[StageChange]:
        """Add a new seed, which trains from the next batch on.

        Raises `RefusedError` unless the slot is DORMANT, and `ValueError` for an empty id.
        """
        self._require_legal(SeedStage.GERMINATED)
        if not seed_id:
            raise ValueError(
                f"slot {self.state.slot!r}: a seed needs an id that is not empty, got {seed_id!r}"
            )
        get_blend(blend)
        self.seed = self._made(blueprint.build, stays=True)
        self.gate = self._new_gate(blend, stays=True)
        self.state = SlotState(
            slot=self.state.slot,
            seed_id=seed_id,
            blueprint=blueprint.name,
            blend=blend,
            seed_parameters=sum(p.numel() for p in self.seed.parameters() if p.requires_grad),
            accuracy=self.state.accuracy,
            accuracy_at_germination=self.state.accuracy,
            accuracies=self.state.accuracies,
        )
        germinated = self._enter(SeedStage.GERMINATED, f"{blueprint.name} seated")
        return [germinated, self._enter(SeedStage.TRAINING, "training begins")]

    def observe(self, measured: Measurement) -> None:
        """Record the measurements of one epoch."""
        state = self.state
        growth = self.growth
        seated = self.seed is not None
        accuracy = measured.accuracy
        before = state.accuracy_before
        since_birth = state.accuracy_at_germination
        since_entry = state.accuracy_at_stage_start
        contributions = state.contributions
        potentials = state.potentials
        if measured.contribution is not None:
            contributions += (measured.contribution,)
        if measured.potential is not None and measured.potential_loss is not None:
            potentials += ((measured.potential, measured.potential_loss),)
        harms = before is not None and state.stage in TRIAL and accuracy < before - growth.harm
        self.state = replace(
            state,
            accuracy=accuracy,
            accuracy_at_germination=accuracy if seated and since_birth is None else since_birth,
            accuracy_at_stage_start=accuracy if since_entry is None else since_entry,
            contribution=measured.contribution,
            potential=measured.potential,
            potential_loss=measured.potential_loss,
            tolerance=measured.tolerance,
            gradient_ratio=measured.gradient_ratio,
            accuracies=(*state.accuracies, accuracy)[-growth.window :],
            contributions=contributions[-growth.window :],
            potentials=potentials[-growth.window :],
            harmed=state.harmed + 1 if harms else 0,
            epochs_in_stage=state.epochs_in_stage + 1,
            epochs_alive=state.epochs_alive + 1 if seated else 0,
        )

    def step_epoch(self, patience: int, *, may_blend: bool = True) -> list[StageChange]:
        """Make the moves that need no controller: gates passed, blending advanced, time over.
        Called once per epoch; `may_blend` is false while another seed is on trial, and `patience`
        is the number of harmful epochs in a row after which a seed is culled."""
        state = self.state
        growth = self.growth
        if state.harmed >= patience:
            below = f"{growth.harm:g} points below its mean before blending"
            return self.cull(f"accuracy was {below} for {state.harmed} epochs")
        match state.stage:
            case SeedStage.TRAINING:
                return self._step_training(may_blend)
            case SeedStage.BLENDING:
                return self._step_blending()
            case SeedStage.PROBATIONARY:
                if state.epochs_in_stage >= growth.probation_timeout:
                    return self.cull("probation_timeout")
            case SeedStage.EMBARGOED if state.epochs_in_stage >= growth.embargo_epochs:
                return [self._enter(SeedStage.DORMANT, "embargo over")]
        return []

    def _step_training(self, may_blend: bool) -> list[StageChange]:
        if self.verdict(SeedStage.BLENDING).passed:
            if not may_blend:
                return []  # it waits for its turn
            before = self.state.accuracies
            change = self._enter(SeedStage.BLENDING, "G2 passed")
            self.statistics = None
            self.state = replace(self.state, accuracy_before=fmean(before) if before else None)
            self._raise_alpha()  # at once: an epoch at alpha 0 would give the seed no gradient
            return [change]
        if self.state.epochs_in_stage >= self.growth.training_timeout:
            return self.cull("training_timeout")
        return []

    def _step_blending(self) -> list[StageChange]:
        state = self.state
        growth = self.growth
        whole = state.alpha_steps >= growth.blending_epochs
        if whole and self.verdict(SeedStage.PROBATIONARY).passed:
            self.gate = None
            return [self._enter(SeedStage.PROBATIONARY, "G3 passed")]
        if state.epochs_in_stage >= growth.blending_timeout:
            return self.cull("blending_timeout")
        before = state.accuracy_before
        accuracy = state.accuracy
        waits = (
            before is not None and accuracy is not None and accuracy < before - growth.blending_cost
        )
        if not waits:
            self._raise_alpha()
        return []

    def start_anew(self) -> None:
        """After the network returned to an earlier state: forget the epochs in between, and restart
        the time of a seed in TRAINING."""
        state = replace(self.state, accuracies=(), potentials=())
        training = state.stage is SeedStage.TRAINING
        self.state = replace(state, epochs_in_stage=0) if training else state

    def verdict(self, stage: SeedStage) -> GateResult:
        """The present verdict of the gate in front of `stage`."""
        return judge(stage, self.state, self.growth)

    def fossilize(self) -> list[StageChange]:
        """Make the seed permanent. `RefusedError` with the gate's reasons where it may not be."""
        self._require_legal(SeedStage.FOSSILIZED)
        gate = self.verdict(SeedStage.FOSSILIZED)
        if not gate.passed:
            raise RefusedError(
                f"slot {self.state.slot!r}: {gate.gate} refuses: {'; '.join(gate.failures)}"
            )
        change = self._enter(SeedStage.FOSSILIZED, "G5 passed")
        self._freeze_fossil()
        return [change]

    def cull(self, reason: str) -> list[StageChange]:
        """Remove a live seed and close the slot for the embargo. `RefusedError` if there is
        none."""
        self._require_legal(SeedStage.CULLED)
        culled = self._enter(SeedStage.CULLED, reason)
        self.seed = self.gate = self.statistics = None
        self._set_alpha(0.0)
        embargoed = self._enter(
            SeedStage.EMBARGOED, f"closed for {self.growth.embargo_epochs} epochs"
        )
        self.state = SlotState(
            slot=self.state.slot, stage=SeedStage.EMBARGOED, accuracy=self.state.accuracy
        )
        return [culled, embargoed]

    def restore(self, state: SlotState, blueprint: Blueprint | None) -> None:
        """Rebuild a saved slot; the seed's weights follow through `load_state_dict`."""
        self.seed = None if blueprint is None else self._made(blueprint.build, stays=False)
        self.statistics = None
        blending = state.stage in (SeedStage.TRAINING, SeedStage.BLENDING)
        self.gate = self._new_gate(state.blend, stays=False) if blending else None
        self.state = state
        self._set_alpha(state.alpha)
        self._freeze_fossil()

    def _enter(self, stage: SeedStage, reason: str) -> StageChange:
        """Move to `stage`. Measurements belong to the stage they were made in, so a contribution is
        dropped."""
        self._require_legal(stage)
        before = self.state
        self.state = replace(
            before,
            stage=stage,
            epochs_in_stage=0,
            previous_stage=before.stage,
            previous_epochs_in_stage=before.epochs_in_stage,
            accuracy_at_stage_start=before.accuracy,
            accuracies=before.accuracies if stage <= SeedStage.TRAINING else (),
            contributions=(),
            potential=None,
            potential_loss=None,
            contribution=before.contribution if stage is SeedStage.FOSSILIZED else None,
        )
        return StageChange(before=before, stage=stage, reason=reason)

    def _require_legal(self, stage: SeedStage) -> None:
        now = self.state.stage
        if stage not in TRANSITIONS[now]:
            legal = ", ".join(s.name for s in sorted(TRANSITIONS[now])) or "none"
            raise RefusedError(
                f"slot {self.state.slot!r} cannot go from {now.name} to {stage.name}; legal: "
                f"{legal}"
            )

    def _new_gate(self, blend: str | None, *, stays: bool) -> Gate | None:
        return self._made(Gate, stays=stays) if blend == "gated" else None

    def _made(self, make: Callable[[int], _Module], *, stays: bool) -> _Module:
        """A new module for features of the slot, the same under any defaults of the process."""
        with plain_defaults():
            module = make(self.channels).to(self.alpha)
        if self.arrange is not None:
            self.arrange(module, stays)
        return module

    def _freeze_fossil(self) -> None:
        fossil = self.seed if self.state.stage is SeedStage.FOSSILIZED else None
        if fossil is not None and self.growth.on_fossilize == "freeze":
            fossil.requires_grad_(False)

    def _raise_alpha(self) -> None:
        """Set alpha for the next epoch of blending; the last one trains at alpha 1."""
        steps = self.state.alpha_steps + 1
        progress = steps / self.growth.blending_epochs
        self._set_alpha(1.0 if progress >= 1 else get_blend(self.state.blend or "")(progress))
        self.state = replace(self.state, alpha_steps=steps)

    def _set_alpha(self, alpha: float) -> None:
        self.alpha.fill_(alpha)
        self.state = replace(self.state, alpha=alpha)


class _StraightThrough(torch.autograd.Function):
    """x in value, with the gradient of the output for x and for z alike, whatever z is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def _plain(x: Tensor) -> Tensor:
    """x with row-major strides where it needs no gradient: on the CPU, group norm's backward
    crashes the process on such an input in channels-last layout, and a 1x1 map's strides say so
    even after `contiguous`."""
    return x if x.requires_grad else x.contiguous().view(-1).view(x.shape)
