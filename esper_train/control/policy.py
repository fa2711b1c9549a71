"""The interface of a controller: it looks at an epoch's signals and decides on one operation."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from esper_train.base.names import require_type
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
    GERMINATE.

    `TypeError` for an `op` that is no `Op`, `ValueError` where the slot or the blueprint is missing
    that the operation needs.
    """

    op: Op
    slot: str | None = None
    blueprint: str | None = None
    blend: str | None = None
    reason: str = ""
    confidence: float = 1.0
    probabilities: Mapping[str, float] | None = None
    """The probability of each possible action, by name, from a controller that has them."""

    def __post_init__(self) -> None:
        require_type(self.op, Op, "op", "pass one of " + ", ".join(f"Op.{op.name}" for op in Op))
        needed = {Op.WAIT: (), Op.GERMINATE: ("slot", "blueprint")}.get(self.op, ("slot",))
        for name in needed:
            if not getattr(self, name):
                raise ValueError(
                    f"a decision to {self.op.name} needs a {name}, got {getattr(self, name)!r}; "
                    f"pass {name}=, or decide to WAIT"
                )


class Policy(Stateful, Protocol):
    """A controller. `decide` is called once per epoch, `reset` before each episode. Its state is
    part of checkpoints."""

    def decide(self, signals: Signals) -> Decision:
        """Choose the operation that follows the epoch that the signals describe."""
        ...

    def reset(self) -> None:
        """Forget the episode before."""
        ...


def checked_policy(policy: Policy) -> Policy:
    """The policy; `TypeError` for an object that lacks a method of one."""
    methods = ("decide", "reset", "state_dict", "load_state_dict")
    lacking = [name for name in methods if not callable(getattr(policy, name, None))]
    if lacking:
        raise TypeError(
            f"expected a policy with the methods {', '.join(methods)}, got {policy!r:.80} without "
            f"{', '.join(lacking)}; write them, or derive from Idle, which has all four"
        )
    return policy


class Idle(PlainState):
    """Always waits; `fit` uses it."""

    def decide(self, signals: Signals) -> Decision:
        """Always wait."""
        return Decision(op=Op.WAIT, reason="plain training")

    def reset(self) -> None:
        """Nothing to reset."""
