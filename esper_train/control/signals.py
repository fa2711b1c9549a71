"""The signals that a controller sees: an epoch's measurements, the recent trend, and the state of
each slot."""

import math
from dataclasses import dataclass

from esper_train.base.state import PlainState
from esper_train.morph.lifecycle import SlotState


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The measurements of one epoch. Losses in nats, accuracies in percentage points, epochs from
    1."""

    epoch: int
    max_epochs: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    guess_loss: float
    """Loss of a random guess, ln(classes)."""
    slots: tuple[SlotState, ...] = ()
    germination_wait: int = 0
    """Epochs for which no seed may germinate yet, after a seed was undone."""
    host_parameters: int = 0
    training_cost: float = 0.0
    """Multiply-adds of training so far, in epochs of the host without a seed."""


@dataclass(frozen=True, kw_only=True)
class Signals(Observation):
    """One epoch as a controller sees it: its measurements and the recent trend."""

    loss_delta: float | None
    """Fall of the validation loss since the last epoch: positive is better, None in the first."""
    accuracy_delta: float | None
    best_val_loss: float
    best_val_accuracy: float
    plateau_epochs: int
    """Epochs since the best validation accuracy last rose by the threshold."""


class SignalTracker(PlainState):
    """Turns epoch results into `Signals`.

    A plateau is measured against the best accuracy so far, because noise from epoch to epoch would
    restart it otherwise.
    """

    STATE = ("_previous", "_best_loss", "_best_accuracy", "_risen_to", "_plateau")

    def __init__(self, *, plateau_threshold: float = 0.5) -> None:
        self._threshold = plateau_threshold
        self.reset()

    def reset(self) -> None:
        """Forget everything, before a new episode."""
        self._previous: tuple[float, float] | None = None  # validation loss and accuracy
        self._best_loss = math.inf
        self._best_accuracy = -math.inf
        self._risen_to = -math.inf  # the accuracy that must be exceeded by the threshold
        self._plateau = 0

    def restart_plateau(self) -> None:
        """Restart the count of a plateau, after the network returned to an earlier state."""
        self._plateau = 0

    def update(self, measured: Observation) -> Signals:
        """Add one epoch. Raises `RuntimeError` if two slots have seeds with the same id."""
        loss = measured.val_loss
        accuracy = measured.val_accuracy
        ids = [state.seed_id for state in measured.slots if state.seed_id is not None]
        if len(set(ids)) != len(ids):
            raise RuntimeError(f"seed ids must differ, got {ids}")
        loss_delta = accuracy_delta = None
        if self._previous is not None:
            previous_loss, previous_accuracy = self._previous
            loss_delta = previous_loss - loss
            accuracy_delta = accuracy - previous_accuracy
        self._plateau += 1
        if accuracy >= self._risen_to + self._threshold:
            self._risen_to = accuracy
            self._plateau = 0
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
        )
