"""The heuristic controller: a few readable rules, and one decision per epoch."""

from collections.abc import Sequence
from statistics import fmean

from esper_train.base.names import require_known, require_names, require_type
from esper_train.base.state import PlainState
from esper_train.control.config import HeuristicConfig
from esper_train.control.policy import Decision, Op
from esper_train.control.signals import Signals
from esper_train.morph.blending import get_blend
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import judge
from esper_train.morph.lifecycle import LIVE, SeedStage, SlotState


class HeuristicTamiyo(PlainState):
    """Germinates on a plateau and fossilizes what passes the gate. Slots cull harmful seeds by
    themselves.

    `blueprints` are those for the host's topology, in order of preference. `ValueError` if there is
    none, or if `config.blueprints` names another.
    """

    STATE = ("_penalties", "_next", "_seated")

    def __init__(
        self, config: HeuristicConfig, growth: GrowthConfig, blueprints: Sequence[str]
    ) -> None:
        require_type(config, HeuristicConfig, "config")
        require_type(growth, GrowthConfig, "growth")
        require_names(blueprints, "blueprints")
        for name in config.blueprints:
            require_known(
                "blueprint (in policy.blueprints, for this host's topology)", name, blueprints
            )
        if not blueprints:
            raise ValueError(
                "there is no blueprint for this host's topology, so nothing could grow"
            )
        get_blend(config.blend)
        self._config = config
        self._growth = growth
        self._rotation = tuple(config.blueprints or blueprints)
        self.reset()

    def reset(self) -> None:
        """Forget the penalties and which blueprint comes next."""
        self._penalties: dict[str, float] = {}
        self._next = 0
        # slot to the blueprint last seen there, to notice every cull, whoever asked for it
        self._seated: dict[str, str] = {}

    def decide(self, signals: Signals) -> Decision:
        """The decision about one epoch, from its signals, which show the slots after their own
        moves."""
        self._penalties = {
            name: p * self._config.penalty_decay for name, p in self._penalties.items()
        }
        for state in signals.slots:
            if state.blueprint is not None:
                self._seated[state.slot] = state.blueprint
            elif (lost := self._seated.pop(state.slot, None)) is not None:
                self._penalties[lost] = self._penalty(lost) + self._config.cull_penalty
        live = [state for state in signals.slots if state.stage in LIVE]
        judged = [self._judge(state) for state in live]
        action = next((decision for decision in judged if decision.op is not Op.WAIT), None)
        if action is not None or len(live) >= self._config.max_live_seeds:
            return action or judged[0]
        return self._consider_germination(signals)

    def too_short(self, max_epochs: int) -> str | None:
        """Why no seed can germinate in a run of so many epochs; None where one can."""
        config = self._config
        first = max(1, config.min_epochs, config.plateau_epochs)
        needed = self._growth.seed_life() + config.life_margin
        if max_epochs >= first + needed:
            return None
        return (
            f"no seed can germinate in {max_epochs} epochs: none does before epoch {first}, and a "
            f"seed's life needs {needed} more; train for at least {first + needed}, or shorten the "
            "stages (growth.*) and policy.life_margin"
        )

    def _judge(self, state: SlotState) -> Decision:
        """Decide about the undecided seed."""
        slot = state.slot
        age = state.epochs_in_stage
        if state.stage is not SeedStage.PROBATIONARY:
            return Decision(
                op=Op.WAIT, slot=slot, reason=f"seed is in {state.stage.name} for {age} epochs"
            )
        gate = judge(SeedStage.FOSSILIZED, state, self._growth)
        if not gate.passed:
            return Decision(op=Op.WAIT, slot=slot, reason="; ".join(gate.failures))
        contribution = fmean(state.contributions)
        reason = f"contributes {contribution:.2f} points"
        confidence = min(1.0, contribution / 5.0)
        return Decision(op=Op.FOSSILIZE, slot=slot, reason=reason, confidence=confidence)

    def _consider_germination(self, signals: Signals) -> Decision:
        config = self._config
        plateau = signals.plateau_epochs
        needed = self._growth.seed_life() + config.life_margin
        left = signals.max_epochs - signals.epoch
        slot = next((s.slot for s in signals.slots if s.stage is SeedStage.DORMANT), None)
        most = self._growth.max_seeds
        seated = sum(s.seed_id is not None for s in signals.slots)
        hindrances = (
            (slot is None, "no slot is open"),
            (most is not None and seated >= most, f"{seated} seeds are the most"),
            (signals.epoch < config.min_epochs, f"before epoch {config.min_epochs}"),
            (left < needed, f"{left} epochs left, a seed's life needs {needed}"),
            (plateau < config.plateau_epochs, "the host is still learning"),
            (
                signals.germination_wait > 0,
                f"{signals.germination_wait} epochs to wait after an undoing",
            ),
        )
        for hinders, reason in hindrances:
            if hinders:
                return Decision(op=Op.WAIT, reason=reason)
        return Decision(
            op=Op.GERMINATE,
            slot=slot,
            blueprint=self._choose_blueprint(),
            blend=config.blend,
            reason=f"accuracy has not risen for {plateau} epochs",
            confidence=min(1.0, plateau / 5.0),
        )

    def _choose_blueprint(self) -> str:
        """The next blueprint in turn below the penalty limit, or else the least penalised one."""
        order = self._rotation[self._next :] + self._rotation[: self._next]
        below = [name for name in order if self._penalty(name) < self._config.penalty_limit]
        chosen = below[0] if below else min(order, key=self._penalty)
        self._next = self._rotation.index(chosen) + 1
        return chosen

    def _penalty(self, blueprint: str) -> float:
        return self._penalties.get(blueprint, 0.0)
