"""The actions of a learned controller: one flat table of joint actions, and which of them are
legal."""

import random
from collections.abc import Sequence

from esper_train.control.policy import Decision, Op
from esper_train.control.signals import Signals
from esper_train.morph.blending import get_blend
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import judge
from esper_train.morph.lifecycle import LIVE, SeedStage, SlotState

REASON = "chosen by the policy"
WAIT = 0
"""The action that is always legal."""


class ActionTable:
    """The joint actions on hosts with these slots, blueprints and blends: WAIT; then, for each
    slot, GERMINATE with each blueprint and each blend, CULL, FOSSILIZE.

    An action is its place in `decisions`.
    """

    def __init__(
        self, slots: Sequence[str], blueprints: Sequence[str], blends: Sequence[str]
    ) -> None:
        for blend in blends:
            get_blend(blend)
        self.slots = tuple(slots)
        self.blueprints = tuple(blueprints)
        self.blends = tuple(blends)
        decisions = [Decision(op=Op.WAIT, reason=REASON)]
        for slot in self.slots:
            decisions += [
                Decision(
                    op=Op.GERMINATE, slot=slot, blueprint=blueprint, blend=blend, reason=REASON
                )
                for blueprint in self.blueprints
                for blend in self.blends
            ]
            decisions += [
                Decision(op=op, slot=slot, reason=REASON) for op in (Op.CULL, Op.FOSSILIZE)
            ]
        self.decisions = tuple(decisions)
        self._places = {_key(decision): place for place, decision in enumerate(decisions)}

    def __len__(self) -> int:
        return len(self.decisions)

    def names(self) -> tuple[str, ...]:
        """Each action in words."""
        return tuple(
            " ".join(filter(None, (d.op.name.lower(), d.slot, d.blueprint, d.blend)))
            for d in self.decisions
        )

    def place(self, decision: Decision) -> int:
        """The action that a decision is; `ValueError` for one that is not in the table."""
        try:
            return self._places[_key(decision)]
        except KeyError:
            raise ValueError(
                f"expected a decision about slots {self.slots}, blueprints {self.blueprints} and "
                f"blends {self.blends}, got {decision}; rl.blends names the blends"
            ) from None

    def mask(self, signals: Signals, growth: GrowthConfig) -> list[bool]:
        """Whether each action would be carried out now. WAIT always is."""
        states = {state.slot: state for state in signals.slots}
        seated = sum(state.seed_id is not None for state in signals.slots)
        full = growth.max_seeds is not None and seated >= growth.max_seeds
        may_germinate = signals.germination_wait == 0 and not full
        return [
            decision.slot is None or _is_legal(decision.op, states[decision.slot], growth)
            if decision.op is not Op.GERMINATE
            else may_germinate and states[decision.slot or ""].stage is SeedStage.DORMANT
            for decision in self.decisions
        ]


def drawn(shares: Sequence[float], seed: int, number: int) -> int:
    """An action by its probability. It depends on the seed and on the number of the draw alone, so
    that the state of whoever draws is that number."""
    (place,) = random.Random(f"{seed} {number}").choices(range(len(shares)), shares)
    return place


def _is_legal(op: Op, state: SlotState, growth: GrowthConfig) -> bool:
    if op is Op.CULL:
        return state.stage in LIVE
    on_probation = state.stage is SeedStage.PROBATIONARY
    return on_probation and judge(SeedStage.FOSSILIZED, state, growth).passed


def _key(decision: Decision) -> tuple[Op, str | None, str | None, str | None]:
    """A decision without its reason, as a key; WAIT is the same whichever slot it names."""
    if decision.op is Op.GERMINATE:
        return decision.op, decision.slot, decision.blueprint, decision.blend
    return decision.op, None if decision.op is Op.WAIT else decision.slot, None, None
