"""Carries out a decision: its reward, the request to a slot, and the optimizers of new seeds.
`epoch` calls it."""

from esper_train.control.policy import Decision, Op
from esper_train.control.rewards import REWARDS
from esper_train.control.signals import Signals
from esper_train.morph.lifecycle import LIVE, RefusedError, SeedStage, SlotState, StageChange
from esper_train.run.episode import Episode


def reward_parts(episode: Episode, signals: Signals, decision: Decision) -> dict[str, float]:
    """The reward of a decision by parts, before it is executed: for the slot it names, or that of
    the first live seed."""
    named = [
        s
        for s in signals.slots
        if s.slot == decision.slot or (decision.slot is None and s.stage in LIVE)
    ]
    state = named[0] if named else SlotState(slot="none")
    host_parameters = sum(p.numel() for p in episode.model.get_host_parameters())
    return REWARDS[episode.config.reward](decision.op, state, signals, host_parameters)


def execute(episode: Episode, decision: Decision) -> tuple[list[StageChange], str | None]:
    """Carry out the decision. Where a slot or a gate refuses, its reason comes back in words."""
    model = episode.model
    slot = decision.slot or ""
    try:
        if decision.op is Op.GERMINATE:
            blueprint = decision.blueprint or ""
            seed_id = f"seed_{episode.seeds_germinated}"
            model.registry.require(model.host.topology, blueprint)
            if episode.trial.wait > 0:
                raise RefusedError(
                    f"no seed germinates for {episode.trial.wait} epochs, after an undoing"
                )
            made = model.germinate_seed(
                blueprint, seed_id, slot=slot, blend=decision.blend or "sigmoid"
            )
            episode.seeds_germinated += 1
            return made, None
        if decision.op is Op.CULL:
            return model.cull_seed(slot=slot, reason=decision.reason), None
        if decision.op is Op.FOSSILIZE:
            return model.fossilize_seed(slot=slot), None
    except RefusedError as refusal:
        return [], str(refusal)
    return [], None


def follow_optimizers(episode: Episode, change: StageChange, epoch: int) -> None:
    """Keep the optimizers in step with the seeds."""
    slot = change.before.slot
    optimizers = episode.optimizers
    gate = f"{slot}.gate"
    frozen = episode.config.growth.on_fossilize == "freeze"
    if change.stage is SeedStage.TRAINING:
        episode.attach_optimizer(slot, epoch)
        if episode.model.slot(slot).gate is not None:
            episode.attach_optimizer(gate, epoch)
    if change.stage is SeedStage.CULLED or (change.stage is SeedStage.FOSSILIZED and frozen):
        optimizers.detach(slot)
    if gate in optimizers and change.stage in (SeedStage.PROBATIONARY, SeedStage.CULLED):
        optimizers.detach(gate)
