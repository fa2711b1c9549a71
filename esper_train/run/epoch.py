"""One epoch of a run, split where the device is waited for and where the controller decides:
`launch`, `observe`, `apply`.

`run` goes through all three for every epoch; whoever steps a run by hand does the same.
"""

from dataclasses import replace

from esper_kernels import compute_all, grad_stats
from esper_train.base.device import resolve_device
from esper_train.control.governor import Finding
from esper_train.control.policy import Decision, Op
from esper_train.control.signals import Signals
from esper_train.morph.lifecycle import (
    TRIAL,
    SeedStage,
    SlotState,
    StageChange,
)
from esper_train.run.cost import seed_cost
from esper_train.run.episode import Episode
from esper_train.run.execute import execute, follow_optimizers, reward_parts
from esper_train.run.measure import (
    Measured,
    joint_contribution,
    launch_epoch,
    observation,
    observe_slots,
    slot_states,
)
from esper_train.run.records import epoch_event, refused_event, stage_event, trouble_events
from esper_train.telemetry.event import Event, EventType
from esper_train.train.errors import BadNumbersError, NonFiniteLossError
from esper_train.train.launched import Launched


class Epoch:
    """Epoch `number` of an episode: `launch`, then `observe` with what was read of it, then `apply`
    if that gave signals."""

    def __init__(self, episode: Episode, number: int) -> None:
        self._episode = episode
        self._number = number
        self.finding: Finding | None = None
        """The governor's finding; None where the losses are good, or were not measured yet."""
        self._verdict = False  # whether a seed was kept
        self._undone = False  # whether the network is not the measured one any more
        self._events: list[Event] = []  # to be written after the epoch's own line

    def launch(self) -> Launched[Measured]:
        """Train and evaluate."""
        self._episode.trial.tick()
        return launch_epoch(self._episode, self._number)

    def observe(self, measured: Measured) -> Signals | None:
        """Track what was measured, and let the slots make their own moves; then a decision is due.

        None where the losses went bad and the epoch is undone: it is over without a decision.
        """
        episode = self._episode
        number = self._number
        train, validation = self._train, self._validation = measured
        episode.accuracy = validation.points
        # the training loss includes skipped batches, so it is not judged
        skips = episode.config.train.on_bad_numbers == "skip"
        training = validation.loss if skips else train.loss
        self.finding = episode.governor.check(training=training, validation=validation.loss)
        if self.finding is not None and episode.trial.slot is not None:
            self._leave_undecided(self.finding)
            self._undo_trial(self.finding)
            return None
        if self.finding is not None and episode.good is not None:
            self._leave_undecided(self.finding)
            self._answer(self.finding)
            return None
        self._measured = observe_slots(episode, train, validation)
        signals = episode.tracker.update(observation(episode, number, train, validation))
        patience = episode.config.governor.patience
        for slot in episode.model.slots:
            may_blend = episode.trial.slot is None
            for change in slot.step_epoch(patience, may_blend=may_blend):
                self._follow(change)
        self._signals = replace(
            signals, slots=slot_states(episode.model), germination_wait=episode.trial.wait
        )
        return self._signals

    def apply(self, decision: Decision) -> float:
        """Carry out a decision, report the epoch, and give what the decision earned.

        Raises `BadNumbersError` where the losses went bad and the run cannot go on; `ValueError`
        for a slot, blueprint or blend that nobody knows.
        """
        episode = self._episode
        number = self._number
        parts = reward_parts(episode, self._signals, decision)
        made, refused = execute(episode, decision)
        for change in made:
            self._follow(change)
        if refused is not None:
            parts = {}
            episode.refused.append((number, decision.op.name, refused))
            self._events.append(refused_event(number, decision, refused))
        line = epoch_event(
            number,
            self._measured,
            self._train,
            self._validation,
            decision,
            max_epochs=episode.config.max_epochs,
            reward_parts=parts,
            refused=refused,
            joint=joint_contribution(self._validation),
        )
        self._report(line, self.finding)
        reward: float = line.data["reward"]
        episode.decided.append((decision.op.name, reward))
        if self.finding is not None:
            self._answer(self.finding)
        else:
            if not self._undone:
                episode.kept.offer(episode.model, number, self._validation.loss)
            if self._verdict:
                episode.model.shrink_host(episode.config.growth.shrink_host)
            due = number % episode.config.governor.snapshot_epochs == 0
            if not episode.governor.suspicious and (due or self._verdict):
                keep_good(episode, number)
        return reward

    def _leave_undecided(self, finding: Finding) -> None:
        """Report an epoch that is to be undone."""
        episode = self._episode
        number = self._number
        decision = Decision(op=Op.WAIT, reason="the epoch is undone")
        line = epoch_event(
            number,
            slot_states(episode.model),
            self._train,
            self._validation,
            decision,
            max_epochs=episode.config.max_epochs,
            reward_parts={"rollback": -episode.config.governor.rollback_penalty},
        )
        episode.decided.append((decision.op.name, line.data["reward"]))
        self._report(line, finding)

    def _report(self, line: Event, finding: Finding | None) -> None:
        """Write the epoch's line, what happened to seeds, bad numbers, and gradients by layer if
        asked for."""
        episode = self._episode
        hub = self._episode.hub
        hub.emit(line)
        self._emit_pending()
        troubles = trouble_events(self._number, self._train, self._validation, finding)
        hub.tick()
        for event in troubles:
            hub.emit(event)
        grad = self._train.grad
        if troubles or (grad is not None and grad.has_exploding):
            hub.escalate()
        if hub.collects(EventType.LAYER_GRADIENTS) and not episode.sharded:
            names, parameters = zip(*episode.model.named_parameters(), strict=True)
            (norms,) = compute_all(grad_stats([p.grad for p in parameters]).norms)  # a host sync
            data = {"norms": dict(zip(names, norms, strict=True))}
            hub.emit(Event(EventType.LAYER_GRADIENTS, self._number, data))

    def _emit_pending(self) -> None:
        for event in self._events:
            self._episode.hub.emit(event)
        self._events.clear()

    def _follow(self, change: StageChange) -> None:
        """Keep optimizers, trial and records in step with a slot's move."""
        episode = self._episode
        number = self._number
        before = change.before
        slot = change.before.slot
        self._events.append(stage_event(number, change))
        follow_optimizers(episode, change, number)
        if change.stage is SeedStage.TRAINING and episode.hub.collects(EventType.SEED_COST):
            model, inputs = episode.counted()
            cost = seed_cost(model, slot, inputs)
            blueprint = episode.model.slot(slot).state.blueprint
            data = {"slot": slot, "blueprint": blueprint, **cost.to_plain()}
            self._events.append(Event(EventType.SEED_COST, number, data))
        if change.stage is SeedStage.BLENDING:
            device = resolve_device(episode.config.governor.snapshot_device)
            episode.trial.begin(episode, slot, number, self._validation.right, device)
        elif change.stage is SeedStage.FOSSILIZED:
            self._verdict = True
            episode.trial.end_kept()
            if before.contribution is not None:
                episode.contributions.append(before.contribution)
        elif change.stage is SeedStage.CULLED and before.stage in TRIAL:
            self._undo(before, change.reason)

    def _undo(self, failed: SlotState, reason: str) -> None:
        """Bring the network back to where it was before a seed that is culled began to blend in."""
        episode = self._episode
        trial = self._episode.trial
        began = trial.began
        trial.end_undone(episode, self._number)
        self._undone = True
        episode.tracker.restart_plateau()
        for slot in episode.model.slots:
            slot.start_anew()
        epochs = self._number - began
        message = (
            f"{failed.seed_id} ({failed.blueprint} in slot {failed.slot}) failed: {reason}; the "
            f"network is as after epoch {began} again, {epochs} epochs of training were in vain, "
            f"and for {trial.wait} epochs no seed germinates"
        )
        data = {
            "slot": failed.slot,
            "seed_id": failed.seed_id,
            "to_epoch": began,
            "epochs": epochs,
            "wait": trial.wait,
            "message": message,
        }
        self._events.append(Event(EventType.UNDONE, self._number, data))

    def _undo_trial(self, finding: Finding) -> None:
        """Losses went bad while a seed was on trial: cull the seed."""
        episode = self._episode
        assert episode.trial.slot is not None
        for change in episode.model.cull_seed(slot=episode.trial.slot, reason=finding.message):
            self._follow(change)
        self._emit_pending()
        episode.governor.restart()

    def _answer(self, finding: Finding) -> None:
        """Follow the policy: go on, return to the last good state and train on new batches, or
        end."""
        episode = self._episode
        number = self._number
        config = episode.config
        governor = episode.governor
        policy = config.train.on_bad_numbers
        most = config.governor.max_rollbacks
        # skipping does not help once the weights themselves are bad
        if policy == "warn" or (policy == "skip" and finding.kind != "nonfinite"):
            return
        if episode.good is None or governor.rollbacks == most:
            kind = NonFiniteLossError if finding.kind == "nonfinite" else BadNumbersError
            after = "" if episode.good is None else f", after {most} rollbacks"
            advice = (
                "try a smaller learning rate, train.grad.clip_norm, or another train.on_bad_numbers"
            )
            raise kind(f"in epoch {number} {finding.message}{after}; {advice}")
        governor.rolled_back()
        gone = slot_states(episode.model)
        to_epoch = episode.good["epoch"]
        episode.go_back(episode.good)
        del episode.contributions[episode.model.fossils :]  # of seeds that are not fossils any more
        states = slot_states(episode.model)
        pairs = zip(gone, states, strict=True)
        moved = [(a, b) for a, b in pairs if (a.stage, a.seed_id) != (b.stage, b.seed_id)]
        undone = "".join(f", {a.slot} from {a.stage.name} to {b.stage.name}" for a, b in moved)
        number_of = f"{governor.rollbacks} of {most} times"
        data = {
            "to_epoch": to_epoch,
            "kind": finding.kind,
            "number": governor.rollbacks,
            "message": f"rolled back to the state after epoch {to_epoch} ({number_of}){undone}",
            "slots": [state.to_plain() for state in states],
        }
        episode.hub.emit(Event(EventType.ROLLBACK, number, data))


def keep_good(episode: Episode, epoch: int) -> None:
    """Keep the state to return to, where the policy wants one and the weights are good. Not during
    a trial: if the seed fails, the network of these epochs is not to come back."""
    wanted = episode.config.train.on_bad_numbers == "rollback" and episode.trial.slot is None
    if wanted and episode.finite():
        device = episode.config.governor.snapshot_device
        episode.hub.emit(Event(EventType.SNAPSHOT, epoch, {"device": device}))
        episode.good = {"epoch": epoch, **episode.snapshot()}
