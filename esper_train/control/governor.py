"""The governor: says when a run's losses have gone bad.

`run.epoch` asks it once per epoch, reports its finding and does what `train.on_bad_numbers` says.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, pstdev

from torch import Tensor

from esper_kernels import grad_stats
from esper_train.base.state import PlainState
from esper_train.control.config import GovernorConfig

LEARNED = 0.6
NEAR_GUESS = 0.065
"""Fractions of the loss of a guess. Below LEARNED something was learned; within NEAR_GUESS of it,
that was lost again."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The fault of an epoch: "nonfinite", "divergence" or "collapse", and the reason in words."""

    kind: str
    message: str


class Governor(PlainState):
    """Compares each epoch's losses with those of the run's good epochs and with that of a guess.

    `guess` is the loss of a random guess, ln(classes); relative to it, one rule serves every task.
    """

    STATE = ("history", "suspicious", "rollbacks")

    def __init__(self, config: GovernorConfig, guess: float) -> None:
        self._config = config
        self.guess = guess
        self.history: list[float] = []
        self.suspicious = self.rollbacks = 0

    def check(self, *, training: float, validation: float) -> Finding | None:
        """Judge an epoch by its losses, in nats. Suspicious epochs stay out of the history."""
        if not (math.isfinite(training) and math.isfinite(validation)):
            losses = f"training {training}, validation {validation}"
            return Finding(kind="nonfinite", message=f"the loss is not finite: {losses}")
        found = self._compare(validation)
        if found is None:
            self.history = [*self.history, validation][-self._config.window :]
        self.suspicious = 0 if found is None else self.suspicious + 1
        return found if self.suspicious >= self._config.patience else None

    def _compare(self, loss: float) -> Finding | None:
        config = self._config
        guess = self.guess
        if len(self.history) < config.min_history:
            return None
        mean = fmean(self.history)
        deviation = pstdev(self.history)
        usual = f"the mean of the last {len(self.history)} good epochs is {mean:.4g}"
        if loss > max(guess, mean + config.sensitivity * deviation, config.multiplier * mean):
            return Finding(
                kind="divergence", message=f"the validation loss diverged to {loss:.4g}; {usual}"
            )
        if mean < LEARNED * guess and abs(loss - guess) < NEAR_GUESS * guess:
            return Finding(
                kind="collapse",
                message=f"the validation loss {loss:.4g} is that of a guess; {usual}",
            )
        return None

    def restart(self) -> None:
        """Forget the history, without a rollback."""
        self.suspicious = 0

    def rolled_back(self) -> None:
        """Count a rollback, and forget the history."""
        self.rollbacks = self.rollbacks + 1
        self.suspicious = 0


def weights_are_finite(weights: Iterable[Tensor]) -> bool:
    """Whether all parameters and buffers are finite. It needs a host sync, but a seed in TRAINING
    does not show in any loss."""
    numbers = [tensor for tensor in weights if tensor.is_floating_point()]
    health = grad_stats(numbers).compute()
    return health.nan_count + health.inf_count == 0
