"""The observation of a learned controller: an epoch's signals as numbers between -1 and 1, field by
field.

A number that was not measured is 0, and a field beside it says whether it was measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from esper_train.control.signals import Signals
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import judge
from esper_train.morph.lifecycle import SeedStage, SlotState

POINTS = 5.0
"""Percentage points of accuracy that tanh maps to 0.76."""
NATS = 0.1
"""The same for a change of loss, as a fraction of the loss of a guess."""
EPOCHS = 5.0
"""A count of as many epochs is 1/2."""


@dataclass(frozen=True)
class Field:
    """One number of an observation, which lies between `low` and `high`."""

    name: str
    low: float
    high: float
    meaning: str
    read: Callable[[Signals], float]


@dataclass(frozen=True)
class SlotField:
    """One number about a slot."""

    name: str
    low: float
    high: float
    meaning: str
    read: Callable[[SlotState, GrowthConfig], float]


def count(epochs: float) -> float:
    """Epochs, from 0 to any number, as a number from 0 to 1."""
    return epochs / (epochs + EPOCHS)


def points(value: float | None) -> float:
    """A difference of accuracies as a number from -1 to 1."""
    return 0.0 if value is None else math.tanh(value / POINTS)


def mean_points(values: Sequence[float]) -> float:
    return points(fmean(values)) if values else 0.0


def measured(value: object | None) -> float:
    return float(value is not None)


def _loss(signals: Signals, loss: float) -> float:
    """A loss as a number from 0 to 1; that of a guess is 1/2."""
    return loss / (loss + (signals.guess_loss or 1.0))


def _fall(signals: Signals) -> float:
    if signals.loss_delta is None:
        return 0.0
    return math.tanh(signals.loss_delta / (NATS * (signals.guess_loss or 1.0)))


def _added(signals: Signals) -> float:
    seeds = sum(state.seed_parameters for state in signals.slots)
    return seeds / (seeds + max(1, signals.host_parameters))


def _extra_cost(signals: Signals) -> float:
    extra = max(0.0, signals.training_cost / signals.epoch - 1.0)
    return extra / (1.0 + extra)


def _gate_passed(state: SlotState, growth: GrowthConfig) -> float:
    on_probation = state.stage is SeedStage.PROBATIONARY
    return float(on_probation and judge(SeedStage.FOSSILIZED, state, growth).passed)


RUN_FIELDS = (
    Field(
        "epochs left", 0, 1, "share of the run that is left", lambda s: 1 - s.epoch / s.max_epochs
    ),
    Field(
        "few epochs left",
        0,
        1,
        "n / (n + 5) for n epochs left",
        lambda s: count(s.max_epochs - s.epoch),
    ),
    Field(
        "training loss", 0, 1, "loss / (loss + loss of a guess)", lambda s: _loss(s, s.train_loss)
    ),
    Field(
        "validation loss", 0, 1, "the same of the validation loss", lambda s: _loss(s, s.val_loss)
    ),
    Field(
        "best validation loss",
        0,
        1,
        "the same of the lowest so far",
        lambda s: _loss(s, s.best_val_loss),
    ),
    Field("training accuracy", 0, 1, "fraction", lambda s: s.train_accuracy / 100),
    Field("validation accuracy", 0, 1, "fraction", lambda s: s.val_accuracy / 100),
    Field("best validation accuracy", 0, 1, "fraction", lambda s: s.best_val_accuracy / 100),
    Field(
        "fall of the loss",
        -1,
        1,
        "tanh of the last fall over a tenth of the loss of a guess",
        _fall,
    ),
    Field(
        "gain of accuracy",
        -1,
        1,
        "tanh of the last gain over 5 points",
        lambda s: points(s.accuracy_delta),
    ),
    Field(
        "plateau", 0, 1, "n / (n + 5) for n epochs of a plateau", lambda s: count(s.plateau_epochs)
    ),
    Field(
        "wait",
        0,
        1,
        "n / (n + 5) for n epochs without germination",
        lambda s: count(s.germination_wait),
    ),
    Field("parameters added", 0, 1, "share of the seeds in all parameters", _added),
    Field(
        "training cost",
        0,
        1,
        "x / (x + 1) for the cost spent on seeds over that of the host",
        _extra_cost,
    ),
)
SLOT_FIELDS = (
    SlotField("alpha", 0, 1, "the seed's share of the output", lambda s, g: s.alpha),
    SlotField("epochs in stage", 0, 1, "n / (n + 5)", lambda s, g: count(s.epochs_in_stage)),
    SlotField(
        "age",
        0,
        1,
        "n / (n + 5) for n epochs since germination",
        lambda s, g: count(s.epochs_alive),
    ),
    SlotField(
        "potential",
        -1,
        1,
        "tanh of the mean potential over 5 points",
        lambda s, g: mean_points([gain for gain, _ in s.potentials]),
    ),
    SlotField("potential measured", 0, 1, "whether it was", lambda s, g: float(bool(s.potentials))),
    SlotField(
        "contribution",
        -1,
        1,
        "tanh of the last contribution over 5 points",
        lambda s, g: points(s.contribution),
    ),
    SlotField(
        "contribution measured", 0, 1, "whether it was", lambda s, g: measured(s.contribution)
    ),
    SlotField(
        "mean contribution",
        -1,
        1,
        "the same of the window's mean",
        lambda s, g: mean_points(s.contributions),
    ),
    SlotField(
        "improvement",
        -1,
        1,
        "tanh of the accuracy gained in the stage over 5 points",
        lambda s, g: points(s.improvement),
    ),
    SlotField(
        "total improvement",
        -1,
        1,
        "the same since germination",
        lambda s, g: points(s.total_improvement),
    ),
    SlotField(
        "gradient ratio",
        0,
        1,
        "gradient of the seed over that of the host, over 10",
        lambda s, g: (s.gradient_ratio or 0.0) / 10,
    ),
    SlotField(
        "harm", 0, 1, "n / (n + 5) for n harmful epochs in a row", lambda s, g: count(s.harmed)
    ),
    SlotField("may be kept", 0, 1, "whether gate G5 passes now", _gate_passed),
)


class Observer:
    """Turns signals into an observation: `RUN_FIELDS`, then for each slot its stage and its
    blueprint, one-hot, and `SLOT_FIELDS`."""

    def __init__(
        self, slots: Sequence[str], blueprints: Sequence[str], growth: GrowthConfig
    ) -> None:
        self._slots = tuple(slots)
        self._blueprints = tuple(blueprints)
        self._growth = growth

    def ranges(self) -> list[tuple[str, float, float]]:
        """Name, lowest and highest value of each number."""
        found = [(field.name, field.low, field.high) for field in RUN_FIELDS]
        for slot in self._slots:
            flags = [stage.name for stage in SeedStage] + list(self._blueprints)
            found += [(f"{slot}: {flag}", 0, 1) for flag in flags]
            found += [(f"{slot}: {field.name}", field.low, field.high) for field in SLOT_FIELDS]
        return found

    def __call__(self, signals: Signals) -> list[float]:
        """The observation. `ValueError` where a number is not finite, which names it."""
        states = {state.slot: state for state in signals.slots}
        numbers = [float(field.read(signals)) for field in RUN_FIELDS]
        for slot in self._slots:
            state = states[slot]
            numbers += [float(state.stage is stage) for stage in SeedStage]
            numbers += [float(state.blueprint == name) for name in self._blueprints]
            numbers += [float(field.read(state, self._growth)) for field in SLOT_FIELDS]
        pairs = zip(numbers, self.ranges(), strict=True)
        wrong = [
            f"{name} is {number}" for number, (name, _, _) in pairs if not math.isfinite(number)
        ]
        if wrong:
            raise ValueError(
                f"the observation of epoch {signals.epoch} is not finite: {', '.join(wrong)}; with "
                "train.on_bad_numbers 'stop' such an epoch ends the episode"
            )
        return numbers
