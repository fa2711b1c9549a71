"""The interface of a controller: it looks at an epoch's signals and decides on one operation."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from esper_train.base.state import PlainState, Stateful
from esper_train.control.signals import Signals


class Op(IntEnum):
    """Operations a controller can ask for. Numbers are those of the audited system."""

    WAIT = 0
    GERMINATE = 1
    CULL = 2
    FOSSILIZE = 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One operation on one slot, with the reason in words. `blueprint` and `blend` belong to
    GERMINATE."""

    op: Op
    slot: str | None = None
    blueprint: str | None = None
    blend: str | None = None
    reason: str = ""
    confidence: float = 1.0
    probabilities: Mapping[str, float] | None = None
    """The probability of each possible action, by name, from a controller that has them."""


class Policy(Stateful, Protocol):
    """A controller. `decide` is called once per epoch, `reset` before each episode. Its state is
    part of checkpoints."""

    def decide(self, signals: Signals) -> Decision:
        """Choose the operation that follows the epoch that the signals describe."""
        ...

    def reset(self) -> None:
        """Forget the episode before."""
        ...


class Idle(PlainState):
    """Always waits; `fit` uses it."""

    def decide(self, signals: Signals) -> Decision:
        """Always wait."""
        return Decision(op=Op.WAIT, reason="plain training")

    def reset(self) -> None:
        """Nothing to reset."""
