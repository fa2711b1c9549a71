"""Controllers to compare with: one that decides at random, and one that follows a list.

Each is a `Policy`, so that it runs wherever the heuristic does.
"""

from collections.abc import Sequence

from esper_train.base.state import PlainState
from esper_train.control.policy import Decision
from esper_train.control.signals import Signals
from esper_train.morph.config import GrowthConfig
from esper_train.rl.actions import ActionTable, drawn


class RandomLegal(PlainState):
    """Any legal action of a table, each as probable as another."""

    STATE = ("_drawn",)

    def __init__(self, table: ActionTable, growth: GrowthConfig, *, seed: int) -> None:
        self._table = table
        self._growth = growth
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Begin the random numbers anew."""
        self._drawn = 0

    def decide(self, signals: Signals) -> Decision:
        mask = self._table.mask(signals, self._growth)
        place = drawn([float(legal) for legal in mask], self._seed, self._drawn)
        self._drawn += 1
        return self._table.decisions[place]


class Script(PlainState):
    """The actions of a list, one per epoch; WAIT after its end."""

    STATE = ("_next",)

    def __init__(self, table: ActionTable, actions: Sequence[int]) -> None:
        self._table = table
        self._actions = tuple(actions)
        self.reset()

    def reset(self) -> None:
        """Begin with the first action again."""
        self._next = 0

    def decide(self, signals: Signals) -> Decision:
        place = self._actions[self._next] if self._next < len(self._actions) else 0
        self._next += 1
        return self._table.decisions[place]
