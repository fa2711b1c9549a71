"""The life of a seed as data: stages, the legal transitions between them, and a slot's state.

`slot` moves along this table, `gates` judge the moves, `control` reads the state; nothing here has
effects.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Self


class SeedStage(IntEnum):
    """The stage of a slot. Numbers are those of the audited system, so that records stay
    comparable."""

    DORMANT = 1
    """Empty and open."""
    GERMINATED = 2
    """A seed is seated and does nothing yet."""
    TRAINING = 3
    """The seed learns; the slot's output is still its input."""
    BLENDING = 4
    """Alpha rises from 0 to 1."""
    PROBATIONARY = 6
    """Alpha is 1; the seed is judged by its contribution."""
    FOSSILIZED = 7
    """A permanent part of the network."""
    CULLED = 8
    """The seed was removed."""
    EMBARGOED = 9
    """Empty and closed for some epochs after a cull."""


TRANSITIONS: Mapping[SeedStage, frozenset[SeedStage]] = MappingProxyType(
    {
        SeedStage.DORMANT: frozenset({SeedStage.GERMINATED}),
        SeedStage.GERMINATED: frozenset({SeedStage.TRAINING, SeedStage.CULLED}),
        SeedStage.TRAINING: frozenset({SeedStage.BLENDING, SeedStage.CULLED}),
        SeedStage.BLENDING: frozenset({SeedStage.PROBATIONARY, SeedStage.CULLED}),
        SeedStage.PROBATIONARY: frozenset({SeedStage.FOSSILIZED, SeedStage.CULLED}),
        SeedStage.FOSSILIZED: frozenset(),
        SeedStage.CULLED: frozenset({SeedStage.EMBARGOED}),
        SeedStage.EMBARGOED: frozenset({SeedStage.DORMANT}),
    }
)
LIVE = frozenset(
    {SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY}
)
"""Stages of an undecided seed: neither fossilized nor culled yet."""


TRIAL = frozenset({SeedStage.BLENDING, SeedStage.PROBATIONARY})
"""Stages in which the network adapts to an undecided seed; a cull then undoes that."""


class RefusedError(ValueError):
    """A gate or the state of a slot does not allow the request. An unknown name is a plain
    `ValueError`."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurements of a slot in one epoch, in percentage points of accuracy; None: not
    measured."""

    accuracy: float
    contribution: float | None = None
    gradient_ratio: float | None = None
    potential: float | None = None
    potential_loss: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """A slot and its seed at the end of an epoch. Accuracies in percentage points; None is "not
    measured"."""

    slot: str
    stage: SeedStage = SeedStage.DORMANT
    seed_id: str | None = None
    blueprint: str | None = None
    blend: str | None = None
    alpha: float = 0.0
    epochs_in_stage: int = 0
    previous_stage: SeedStage | None = None
    previous_epochs_in_stage: int = 0
    epochs_alive: int = 0
    seed_parameters: int = 0
    accuracy: float | None = None
    accuracy_at_germination: float | None = None
    accuracy_at_stage_start: float | None = None
    contribution: float | None = None
    """With alpha above 0: validation accuracy minus that with this slot's alpha at 0, measured in
    the present stage."""
    potential: float | None = None
    """With alpha 0: validation accuracy with the seed at alpha 1 minus the accuracy without it. The
    network has never adapted to the seed, so the difference is due to the seed alone."""
    potential_loss: float | None = None
    """The same difference of the validation loss, in nats: negative if the seed helps."""
    tolerance: float | None = None
    """Standard error of the difference between the accuracy now and before blending, from the rows
    whose prediction became right or wrong."""
    gradient_ratio: float | None = None
    """Gradient norm of the seed over that of the host, corrected for their sizes."""
    accuracies: tuple[float, ...] = ()
    """Accuracies of the last epochs in the present stage, as many as the window has; an empty slot
    counts as one stage with TRAINING."""
    potentials: tuple[tuple[float, float], ...] = ()
    """`potential` and `potential_loss` of the last epochs in TRAINING, as many as the window
    has."""
    contributions: tuple[float, ...] = ()
    """`contribution` of the last epochs in the present stage, as many as the window has."""
    accuracy_before: float | None = None
    """Mean accuracy of the window before blending."""
    alpha_steps: int = 0
    """Epochs of blending in which alpha rose."""
    harmed: int = 0
    """Epochs in a row with an accuracy far below that before blending."""

    @property
    def improvement(self) -> float | None:
        """Accuracy gained since the present stage began."""
        return _difference(self.accuracy, self.accuracy_at_stage_start)

    @property
    def total_improvement(self) -> float | None:
        """Accuracy gained since germination."""
        return _difference(self.accuracy, self.accuracy_at_germination)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, stages by name, for JSON and for files without objects of ours."""
        return {
            key: value.name if isinstance(value, SeedStage) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """The state that `to_plain` wrote."""
        stages = {
            key: SeedStage[values[key]]
            for key in ("stage", "previous_stage")
            if values[key] is not None
        }
        tuples = {
            "accuracies": tuple(values["accuracies"]),
            "contributions": tuple(values["contributions"]),
            "potentials": tuple((gain, loss) for gain, loss in values["potentials"]),
        }
        return cls(**{**values, **stages, **tuples})


@dataclass(frozen=True, kw_only=True)
class StageChange:
    """One move of a slot: the state it left, the stage it entered, and why."""

    before: SlotState
    stage: SeedStage
    reason: str


def _difference(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else now - then
