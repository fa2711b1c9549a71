"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows, epoch by epoch.

`cli` calls `prepare` and `run_episode`; `run_heuristic_episode`, `train_heuristic` and `run_fit` do both for
those who import the package. Plain training is the same run with no slots and a controller that never acts.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from esper_kernels import compute_all, grad_stats
from esper_train.base.names import require_known
from esper_train.config import RunConfig
from esper_train.control.governor import Finding, weights_are_finite
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Op, Policy
from esper_train.control.rewards import REWARDS
from esper_train.control.signals import Observation, Signals
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.gates import gradient_ratio
from esper_train.morph.lifecycle import LIVE, SeedStage, SlotState, StageChange
from esper_train.morph.model import MorphModel
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Checkpoints
from esper_train.run.episode import Episode
from esper_train.run.records import epoch_event, plain, stage_event, trouble_events
from esper_train.tasks import Task
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.train.errors import BadNumbersError, NonFiniteLossError
from esper_train.train.loop import EpochResult, EvalResult, Measures, evaluate, train_one_epoch

EPISODE_SEED_STEP = 1000
"""Distance between the seeds of successive episodes."""
JOINT = "+"
"""The variant without any of the seeds measured in an epoch; no slot has this name."""


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """What came of a run. Accuracies in percent."""

    accuracy: float
    """Validation accuracy after the last epoch."""
    test: Measures
    """The test split, which no decision ever saw."""
    parameters: int
    fossils: int
    contributions: tuple[float, ...]
    """Measured contribution of each fossilized seed when it was kept, in percentage points."""
    action_counts: dict[str, int]
    rewards: tuple[float, ...]
    """Reward of each epoch's decision, of the kind that `config.reward` names."""
    seconds: float
    model: MorphModel

    def as_audited(self) -> tuple[float, dict[str, int], list[float]]:
        """What the audited `run_heuristic_episode` returned: accuracy, action counts, rewards."""
        return self.accuracy, self.action_counts, list(self.rewards)


def run_heuristic_episode(
    config: RunConfig,
    *,
    task: Task | None = None,
    policy: Policy | None = None,
    hub: TelemetryHub | None = None,
    registry: BlueprintRegistry | None = None,
) -> EpisodeResult:
    """Grow a network under a controller, the heuristic one unless another is given.

    Raises:
        ValueError: no slots, unknown or repeated ones, gradients never measured, or bad data.
        BadNumbersError: the losses went bad; `NonFiniteLossError` where they are NaN or infinite.
    """
    return run_episode(prepare(config, "heuristic", task=task, policy=policy, hub=hub, registry=registry))


def train_heuristic(
    config: RunConfig, *, task: Task | None = None, hub: TelemetryHub | None = None
) -> list[EpisodeResult]:
    """`config.episodes` runs one after the other, with the seeds seed, seed + 1000, ..."""
    return [run_heuristic_episode(c, task=task, hub=hub) for c in episode_configs(config)]


def run_fit(config: RunConfig, *, task: Task | None = None, hub: TelemetryHub | None = None) -> EpisodeResult:
    """Train the same host without slots, by the same loop."""
    return run_episode(prepare(config, "fit", task=task, hub=hub))


def episode_configs(config: RunConfig) -> list[RunConfig]:
    """The config of each episode."""
    return [replace(config, seed=config.seed + EPISODE_SEED_STEP * i, episodes=1) for i in range(config.episodes)]


def prepare(
    config: RunConfig,
    mode: str,
    *,
    task: Task | None = None,
    policy: Policy | None = None,
    hub: TelemetryHub | None = None,
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """What a "heuristic" or "fit" run owns; the latter has no controller. `ValueError` for what could not work."""
    require_known("mode", mode, ("heuristic", "fit"))
    growing = mode == "heuristic"
    if policy is not None and not growing:
        raise ValueError("a policy decides about seeds, and a `fit` run has none; leave it out, or use `heuristic`")
    if growing and not config.slots:
        raise ValueError("no slots: name at least one of early, mid, late, or use `fit` to train without growth")
    if growing and config.train.grad.every == 0:
        raise ValueError("train.grad.every is 0: growth needs the gradient statistics; use 1, or `fit`")
    episode = build_episode(config, task=task, slots=config.slots if growing else (), registry=registry)
    episode.mode, episode.hub = mode, hub or TelemetryHub()
    if growing:
        names = episode.model.registry.names(episode.model.host.topology)
        episode.policy = policy or HeuristicTamiyo(config.policy, config.growth, names)
    return episode


def run_episode(episode: Episode, checkpoints: Checkpoints | None = None) -> EpisodeResult:
    """Run every epoch in the one order there is: train, evaluate, track, slots step, decide, execute.

    An episode restored from a checkpoint goes on with the epoch after it. One that the governor finds gone bad is, by
    policy, reported, the last, or undone: then nothing is tracked or decided. However the run ends, its last event is
    RUN_FINISHED with the status "completed", "interrupted", "nonfinite", "diverged" or "failed"; what ended it is
    raised again.
    """
    config, hub = episode.config, episode.hub
    status, why, test = "failed", None, None
    epoch, started = episode.epoch, time.perf_counter() - episode.seconds
    if epoch == 0:
        episode.policy.reset()
        hub.emit(run_started(episode))
    try:
        with episode.random.active():
            _keep(episode, epoch)
            for epoch in range(episode.epoch + 1, config.max_epochs + 1):
                train, validation = _train_and_evaluate(episode, epoch)
                episode.accuracy = validation.accuracy
                # a skipped batch is in the training loss, so that is no finding
                training = validation.loss if config.train.on_bad_numbers == "skip" else train.loss
                finding = episode.governor.check(training=training, validation=validation.loss)
                if finding is None or episode.good is None:
                    _grow(episode, epoch, train, validation)
                else:
                    _leave_undecided(episode, epoch, train, validation)
                _report_numbers(episode, epoch, train, validation, finding)
                if finding is not None:
                    _answer(episode, epoch, finding)
                elif not episode.governor.suspicious and epoch % config.governor.snapshot_epochs == 0:
                    _keep(episode, epoch)
                episode.epoch, episode.seconds = epoch, time.perf_counter() - started
                if checkpoints is not None:
                    checkpoints.take(episode)
            batches = map(episode.stop.before, episode.test)
            kept: dict[str, Any] = {"task_type": episode.task.task_type, "step": episode.step}
            test = evaluate(episode.model, batches, config.train, **kept)
            status = "completed"
    except BaseException as error:
        kinds = ((KeyboardInterrupt, "interrupted"), (NonFiniteLossError, "nonfinite"), (BadNumbersError, "diverged"))
        status = next((name for kind, name in kinds if isinstance(error, kind)), "failed")
        why = str(error) if isinstance(error, Exception) else None
        raise
    finally:
        model = episode.model
        outcome: dict[str, Any] = {
            "accuracy": episode.accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "fossils": model.fossils,
            "contributions": tuple(episode.contributions),
            "action_counts": {op.name: sum(name == op.name for name, _ in episode.decided) for op in Op},
            "rewards": tuple(reward for _, reward in episode.decided),
            "seconds": time.perf_counter() - started,
        }
        ending = {"status": status, "error": why, "test": test and plain(test)}
        hub.emit(Event(EventType.RUN_FINISHED, epoch, ending | outcome))
        if checkpoints is not None:
            checkpoints.write()
    return EpisodeResult(model=model, test=test, **outcome)


def run_started(episode: Episode) -> Event:
    """The first event of a run."""
    config, model = episode.config, episode.model
    data = {
        "mode": episode.mode,
        "task": episode.task.name,
        "seed": config.seed,
        "max_epochs": config.max_epochs,
        "device": str(episode.device),
        "backend": episode.step.backend(episode.device),
        "slots": [state.slot for state in _states(model)],
        "data": dict(episode.data_record),
        "host_parameters": sum(p.numel() for p in model.get_host_parameters()),
    }
    return Event(EventType.RUN_STARTED, 0, data)


def _train_and_evaluate(episode: Episode, epoch: int) -> tuple[EpochResult, EvalResult]:
    config, model = episode.config, episode.model
    kept: dict[str, Any] = {"task_type": episode.task.task_type, "step": episode.step}
    optimizers, most, batches = episode.optimizers, config.max_batches, map(episode.stop.before, episode.train)
    train = train_one_epoch(model, batches, optimizers, config.train, max_batches=most, governed=True, **kept)
    check_fossils = epoch % config.growth.fossil_check_epochs == 0 or epoch == config.max_epochs
    ablated = [s.slot for s in _states(model) if s.alpha > 0 and (s.stage is not SeedStage.FOSSILIZED or check_fossils)]
    variants = {slot: {slot: 0.0} for slot in ablated}
    if len(ablated) > 1:
        variants[JOINT] = dict.fromkeys(ablated, 0.0)
    batches = map(episode.stop.before, episode.validation)
    return train, evaluate(model, batches, config.train, variants=variants, **kept)


def _grow(episode: Episode, epoch: int, train: EpochResult, validation: EvalResult) -> None:
    """Tracker, the slots' own moves, decision and its execution, of one epoch."""
    model, config, accuracy = episode.model, episode.config, validation.accuracy
    for slot in model.slots:
        name = slot.state.slot
        slot.observe(accuracy, validation.contribution(name), gradient_ratio(train.grad, name))
    measured = Observation(
        epoch=epoch,
        max_epochs=config.max_epochs,
        train_loss=train.loss,
        train_accuracy=train.accuracy,
        val_loss=validation.loss,
        val_accuracy=accuracy,
        slots=_states(model),
    )
    signals = episode.tracker.update(measured)
    changes = [change for slot in model.slots for change in slot.step_epoch()]
    stepped = replace(signals, slots=_states(model))
    decision = episode.policy.decide(stepped)
    parts = _reward(episode, stepped, decision)
    made, refused = _execute(episode, decision)
    changes += made
    more = {"joint": _joint(validation), "refused": refused, **_earn(episode, decision, parts)}
    episode.hub.emit(epoch_event(epoch, signals.slots, train, validation, decision, **more))
    for change in changes:
        _follow(episode, change, epoch)
        episode.hub.emit(stage_event(epoch, change))
        if change.stage is SeedStage.FOSSILIZED and change.before.contribution is not None:
            episode.contributions.append(change.before.contribution)


def _leave_undecided(episode: Episode, epoch: int, train: EpochResult, validation: EvalResult) -> None:
    """Report an epoch that is to be undone."""
    decision = Decision(op=Op.WAIT, reason="the epoch is undone")
    more = _earn(episode, decision, {"rollback": -episode.config.governor.rollback_penalty})
    episode.hub.emit(epoch_event(epoch, _states(episode.model), train, validation, decision, **more))


def _earn(episode: Episode, decision: Decision, parts: dict[str, float]) -> dict[str, Any]:
    """Note what a decision earned; what its epoch's line says of that."""
    reward = math.fsum(parts.values())
    episode.decided.append((decision.op.name, reward))
    return {"max_epochs": episode.config.max_epochs, "reward": reward, "reward_parts": parts}


def _joint(validation: EvalResult) -> dict[str, Any] | None:
    """What the seeds measured in this epoch contribute together, where there were several."""
    if JOINT not in validation.variants:
        return None
    slots = [name for name in validation.variants if name != JOINT]
    return {"slots": slots, "contribution": validation.contribution(JOINT)}


def _reward(episode: Episode, signals: Signals, decision: Decision) -> dict[str, float]:
    """What a decision earns by parts, before it is executed: on the slot it names, or that of the first live seed."""
    named = [s for s in signals.slots if s.slot == decision.slot or (decision.slot is None and s.stage in LIVE)]
    state = named[0] if named else SlotState(slot="none")
    host_parameters = sum(p.numel() for p in episode.model.get_host_parameters())
    return REWARDS[episode.config.reward](decision.op, state, signals, host_parameters)


def _execute(episode: Episode, decision: Decision) -> tuple[list[StageChange], str | None]:
    """Do what the controller asked; what the model refuses comes back as the reason in words."""
    model, slot, made = episode.model, decision.slot or "", []
    try:
        if decision.op is Op.GERMINATE:
            blueprint, seed_id = decision.blueprint or "", f"seed_{episode.seeds_germinated}"
            made = model.germinate_seed(blueprint, seed_id, slot=slot, blend=decision.blend or "sigmoid")
            episode.seeds_germinated += 1
        elif decision.op is Op.CULL:
            made = model.cull_seed(slot=slot, reason=decision.reason)
        elif decision.op is Op.FOSSILIZE:
            made = model.fossilize_seed(slot=slot)
    except ValueError as refusal:
        return [], str(refusal)
    return made, None


def _follow(episode: Episode, change: StageChange, epoch: int) -> None:
    """Keep the optimizers in step with the seeds."""
    slot, optimizers = change.before.slot, episode.optimizers
    gate, frozen = f"{slot}.gate", episode.config.growth.on_fossilize == "freeze"
    if change.stage is SeedStage.TRAINING:
        episode.attach_optimizer(slot, epoch)
        if episode.model.slot(slot).gate is not None:
            episode.attach_optimizer(gate, epoch)
    if change.stage is SeedStage.CULLED or (change.stage is SeedStage.FOSSILIZED and frozen):
        optimizers.detach(slot)
    if gate in optimizers and change.stage in (SeedStage.PROBATIONARY, SeedStage.CULLED):
        optimizers.detach(gate)


def _report_numbers(
    episode: Episode, epoch: int, train: EpochResult, validation: EvalResult, found: Finding | None
) -> None:
    """Report bad numbers, and each parameter's gradient where the level asks for it."""
    hub, troubles = episode.hub, trouble_events(epoch, train, validation, found)
    hub.tick()
    for event in troubles:
        hub.emit(event)
    if troubles or (train.grad is not None and train.grad.has_exploding):
        hub.escalate()
    if hub.collects(EventType.LAYER_GRADIENTS):
        names, parameters = zip(*episode.model.named_parameters(), strict=True)
        (norms,) = compute_all(grad_stats([p.grad for p in parameters]).norms)  # a host sync
        hub.emit(Event(EventType.LAYER_GRADIENTS, epoch, {"norms": dict(zip(names, norms, strict=True))}))


def _keep(episode: Episode, epoch: int) -> None:
    """Keep the state to return to, where the policy wants one and the weights are good."""
    if episode.config.train.on_bad_numbers == "rollback" and weights_are_finite(episode.model):
        episode.hub.emit(Event(EventType.SNAPSHOT, epoch, {"device": episode.config.governor.snapshot_device}))
        episode.good = {"epoch": epoch, **episode.snapshot()}


def _answer(episode: Episode, epoch: int, finding: Finding) -> None:
    """Do what the policy says: go on, return to the last good state (the batches that come next are others), or end."""
    config, governor = episode.config, episode.governor
    policy, most = config.train.on_bad_numbers, config.governor.max_rollbacks
    # skipping helps no longer when the weights are bad themselves
    if policy == "warn" or (policy == "skip" and finding.kind != "nonfinite"):
        return
    if episode.good is None or governor.rollbacks == most:
        kind = NonFiniteLossError if finding.kind == "nonfinite" else BadNumbersError
        after = "" if episode.good is None else f", after {most} rollbacks"
        advice = "try a smaller learning rate, train.grad.clip_norm, or another train.on_bad_numbers"
        raise kind(f"in epoch {epoch} {finding.message}{after}; {advice}")
    governor.rolled_back()
    gone, to_epoch = _states(episode.model), episode.good["epoch"]
    episode.go_back(episode.good)
    del episode.contributions[episode.model.fossils :]  # of seeds that are no fossils any more
    states = _states(episode.model)
    pairs = [(a, b) for a, b in zip(gone, states, strict=True) if (a.stage, a.seed_id) != (b.stage, b.seed_id)]
    undone = "".join(f", {a.slot} from {a.stage.name} to {b.stage.name}" for a, b in pairs)
    words = f"rolled back to the state after epoch {to_epoch} ({governor.rollbacks} of {most} times){undone}"
    data = {"to_epoch": to_epoch, "kind": finding.kind, "number": governor.rollbacks, "message": words}
    episode.hub.emit(Event(EventType.ROLLBACK, epoch, data | {"slots": [state.to_plain() for state in states]}))


def _states(model: MorphModel) -> tuple[SlotState, ...]:
    return tuple(slot.state for slot in model.slots)
