"""Helpers for tests of slots: seeds with an obvious effect, a slot in any stage, and what to
compare."""

from typing import Any

import torch
from torch import Tensor, nn

from esper_train.morph.blueprints import Blueprint
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import LIVE, Measurement, SeedStage, SlotState, StageChange
from esper_train.morph.slot import SeedSlot

SEATED = [*sorted(LIVE), SeedStage.FOSSILIZED]
EMPTY = [SeedStage.DORMANT, SeedStage.CULLED, SeedStage.EMBARGOED]


class Affine(nn.Module):
    """z = 2 x + 1 at birth: not the identity, so that a seed's part in a sum shows, and exact in
    floats."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 2.0))
        self.shift = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.gain * x + self.shift


AFFINE = Blueprint("affine", "cnn", Affine)
NOTHING = Blueprint("nothing", "cnn", lambda channels: nn.Identity())


def empty_slot(**growth: Any) -> SeedSlot:
    return SeedSlot("mid", 3, GrowthConfig(**growth))


def slot_in(
    stage: SeedStage, *, alpha: float = 1.0, contribution: float | None = None, **growth: Any
) -> SeedSlot:
    """A slot in a stage, with an `Affine` seed where the stage has one."""
    slot = empty_slot(**growth)
    if stage in SEATED:
        state = SlotState(
            slot="mid",
            stage=stage,
            seed_id="s0",
            blueprint="affine",
            blend="sigmoid",
            alpha=0.0 if stage <= SeedStage.TRAINING else alpha,
            epochs_in_stage=1,
            epochs_alive=4,
            seed_parameters=4,
            accuracy=60.0,
            accuracy_at_germination=50.0,
            accuracy_at_stage_start=59.0,
            contribution=contribution,
            gradient_ratio=0.5,
            accuracies=(60.0,) * 5,
            contributions=() if contribution is None else (contribution,) * 5,
            accuracy_before=60.0 if stage > SeedStage.TRAINING else None,
            tolerance=0.0,
        )
        slot.restore(state, AFFINE)
    else:
        slot.restore(SlotState(slot="mid", stage=stage, accuracy=60.0), None)
    return slot


def affine(slot: SeedSlot) -> Affine:
    assert isinstance(slot.seed, Affine)
    return slot.seed


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def snapshot(slot: SeedSlot) -> tuple[Any, ...]:
    """The state that a refused request must leave alone."""
    parameters = {
        name: (p.detach().clone(), p.requires_grad) for name, p in slot.named_parameters()
    }
    return (
        slot.state,
        slot.seed,
        float(slot.alpha),
        {n: (v.tolist(), g) for n, (v, g) in parameters.items()},
    )


def moves(changes: list[StageChange]) -> list[tuple[str, str, str]]:
    return [(c.before.stage.name, c.stage.name, c.reason) for c in changes]


def observe(
    slot: SeedSlot,
    accuracy: float,
    contribution: float | None = None,
    ratio: float | None = None,
    potential: tuple[float, float] | None = None,
) -> None:
    """Give a slot the measurements of an epoch."""
    gain, loss = potential or (None, None)
    slot.observe(
        Measurement(
            accuracy=accuracy,
            contribution=contribution,
            gradient_ratio=ratio,
            potential=gain,
            potential_loss=loss,
            tolerance=1.0,
        )
    )


HELPS = (1.0, -0.25)
"""A potential that passes the gate."""


def epoch(
    slot: SeedSlot,
    accuracy: float,
    contribution: float | None = None,
    ratio: float | None = 1.0,
    potential: tuple[float, float] | None = HELPS,
    may_blend: bool = True,
    patience: int = 3,
) -> list[StageChange]:
    """Treat a slot as a run does at the end of an epoch."""
    learns = slot.state.stage is SeedStage.TRAINING
    observe(slot, accuracy, contribution, ratio, potential if learns else None)
    return slot.step_epoch(patience, may_blend=may_blend)


# (stage, alpha) after each epoch; the sigmoid at 1/5, 2/5, 3/5, 4/5 is 0.0266, 0.2315, 0.7685,
# 0.9734. The first of them is there when blending begins: an epoch at alpha 0 would teach the seed
# nothing.
FASTEST_LIFE = [
    ("TRAINING", 0.0),
    ("TRAINING", 0.0),
    ("TRAINING", 0.0),
    ("TRAINING", 0.0),
    ("BLENDING", 0.0266),
    ("BLENDING", 0.2315),
    ("BLENDING", 0.7685),
    ("BLENDING", 0.9734),
    ("BLENDING", 1.0),
    ("PROBATIONARY", 1.0),
]
