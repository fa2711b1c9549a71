"""What a controller sees: the epoch's measurements, their recent course, and the state of every slot."""

import math
from dataclasses import dataclass

from esper_train.base.state import PlainState
from esper_train.morph.lifecycle import SlotState

STABLE_LOSS_CHANGE = (-0.05, 0.03)
"""Relative fall of the validation loss within which an epoch counts as stable."""
STABLE_EPOCHS = 3
"""Stable epochs in a row after which the host counts as stable for good."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one epoch measured. Losses in nats, accuracies in percentage points, epochs from 1."""

    epoch: int
    max_epochs: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    slots: tuple[SlotState, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Signals(Observation):
    """One epoch as a controller sees it: its measurements and their recent course."""

    loss_delta: float | None
    """Fall of the validation loss since the epoch before, positive is better; None in the first."""
    accuracy_delta: float | None
    best_val_loss: float
    best_val_accuracy: float
    plateau_epochs: int
    """Epochs since the best validation accuracy last rose by the threshold."""
    host_stable: bool


class SignalTracker(PlainState):
    """Turns epoch results into `Signals`.

    A plateau is measured against the best accuracy so far: differences from epoch to epoch would start it anew
    on noise. The host is stable once the loss barely moved for three epochs in a row, and during a plateau.
    """

    STATE = ("_previous", "_best_loss", "_best_accuracy", "_risen_to", "_plateau", "_stable_streak", "_stable")

    def __init__(self, *, plateau_threshold: float = 0.5, plateau_epochs: int = 3) -> None:
        self._threshold = plateau_threshold
        self._plateau_length = plateau_epochs
        self.reset()

    def reset(self) -> None:
        """Forget everything, before a new episode."""
        self._previous: tuple[float, float] | None = None  # validation loss and accuracy
        self._best_loss = math.inf
        self._best_accuracy = -math.inf
        self._risen_to = -math.inf  # the accuracy from which a rise by the threshold is counted
        self._plateau = 0
        self._stable_streak = 0
        self._stable = False

    def update(self, measured: Observation) -> Signals:
        """Take one epoch in. `RuntimeError` if two slots carry a seed of the same id."""
        loss, accuracy = measured.val_loss, measured.val_accuracy
        ids = [state.seed_id for state in measured.slots if state.seed_id is not None]
        if len(set(ids)) != len(ids):
            raise RuntimeError(f"seed ids must differ, got {ids}")
        loss_delta = accuracy_delta = None
        if self._previous is not None:
            previous_loss, previous_accuracy = self._previous
            loss_delta, accuracy_delta = previous_loss - loss, accuracy - previous_accuracy
            low, high = STABLE_LOSS_CHANGE
            quiet = previous_loss > 0 and low <= loss_delta / previous_loss <= high
            self._stable_streak = self._stable_streak + 1 if quiet else 0
            self._stable = self._stable or self._stable_streak >= STABLE_EPOCHS
        self._plateau += 1
        if accuracy >= self._risen_to + self._threshold:
            self._risen_to, self._plateau = accuracy, 0
        self._previous = (loss, accuracy)
        self._best_loss = min(self._best_loss, loss)
        self._best_accuracy = max(self._best_accuracy, accuracy)
        return Signals(
            **vars(measured),
            loss_delta=loss_delta,
            accuracy_delta=accuracy_delta,
            best_val_loss=self._best_loss,
            best_val_accuracy=self._best_accuracy,
            plateau_epochs=self._plateau,
            host_stable=self._stable or self._plateau >= self._plateau_length,
        )
