"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows, epoch by epoch.

`cli` calls `build_episode` and `run_episode`; `run_heuristic_episode`, `train_heuristic` and `run_fit` do both for
those who import the package. Plain training is the same run with no slots and a controller that never acts.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from esper_kernels import compute_all, grad_stats
from esper_train.build import Episode, build_episode, make_optimizer, random_state, resolve_device
from esper_train.config import RunConfig
from esper_train.control.governor import Finding, Governor, Snapshot, weights_are_finite
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Idle, Op, Policy
from esper_train.control.rewards import REWARDS
from esper_train.control.signals import Signals
from esper_train.loop import EpochResult, EvalResult, Measures, evaluate, train_one_epoch
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.gates import gradient_ratio
from esper_train.morph.lifecycle import LIVE, SeedStage, SlotState, StageChange
from esper_train.morph.model import MorphModel
from esper_train.tasks import Task
from esper_train.telemetry.events import Event, EventType, epoch_event, plain, stage_event, trouble_events
from esper_train.telemetry.hub import TelemetryHub

EPISODE_SEED_STEP = 1000
"""Distance between the seeds of successive episodes."""
JOINT = "+"
"""The variant without any of the seeds measured in an epoch; no slot has this name."""


class BadNumbersError(ArithmeticError):
    """The losses went bad, and by the run's policy it cannot go on."""


class NonFiniteLossError(BadNumbersError):
    """The loss became NaN or infinite."""


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
    episode = build_episode(config, task=task, slots=require_slots(config), registry=registry)
    return run_episode(episode, policy or heuristic_policy(episode), hub, mode="heuristic")


def train_heuristic(
    config: RunConfig, *, task: Task | None = None, hub: TelemetryHub | None = None
) -> list[EpisodeResult]:
    """`config.episodes` runs one after the other, with the seeds seed, seed + 1000, ..."""
    return [run_heuristic_episode(c, task=task, hub=hub) for c in episode_configs(config)]


def run_fit(config: RunConfig, *, task: Task | None = None, hub: TelemetryHub | None = None) -> EpisodeResult:
    """Train the same host without slots, by the same loop."""
    return run_episode(build_episode(config, task=task, slots=()), Idle(), hub, mode="fit")


def episode_configs(config: RunConfig) -> list[RunConfig]:
    """The config of each episode."""
    return [replace(config, seed=config.seed + EPISODE_SEED_STEP * i, episodes=1) for i in range(config.episodes)]


def require_slots(config: RunConfig) -> tuple[str, ...]:
    """The slots of a run that is to grow; `ValueError` if it could not."""
    if not config.slots:
        raise ValueError("no slots: name at least one of early, mid, late, or use `fit` to train without growth")
    if config.train.grad.every == 0:
        raise ValueError("train.grad.every is 0: growth needs the gradient statistics; use 1, or `fit`")
    return config.slots


def heuristic_policy(episode: Episode) -> HeuristicTamiyo:
    """The heuristic controller for this run's host."""
    names = episode.model.registry.names(episode.model.host.topology)
    return HeuristicTamiyo(episode.config.policy, episode.config.growth, names)


def run_episode(episode: Episode, policy: Policy, hub: TelemetryHub | None = None, *, mode: str) -> EpisodeResult:
    """Run every epoch in the one order there is: train, evaluate, track, slots step, decide, execute.

    An epoch that the governor finds gone bad is, by policy, reported, the last, or undone: then nothing is tracked
    or decided. However the run ends, its last event is RUN_FINISHED with the status "completed", "interrupted",
    "nonfinite", "diverged" or "failed"; what ended it is raised again.
    """
    config, model, hub = episode.config, episode.model, hub or TelemetryHub()
    started, status, epoch, why = time.perf_counter(), "failed", 0, None
    governor = Governor(config.governor, math.log(episode.task.num_classes))
    good: Snapshot | None = None
    accuracy, test = math.nan, None
    decided: list[tuple[str, float]] = []  # operation and reward of each epoch
    contributions: list[float] = []
    policy.reset()
    hub.emit(_run_started(episode, mode))
    try:
        with random_state(config.seed + 1, episode.device):
            good = _keep(episode, 0, hub) or good
            for epoch in range(1, config.max_epochs + 1):
                train, validation = _train_and_evaluate(episode, epoch)
                # a skipped batch is in the training loss, so that is no finding
                training = validation.loss if config.train.on_bad_numbers == "skip" else train.loss
                accuracy, finding = validation.accuracy, governor.check(training=training, validation=validation.loss)
                troubles = trouble_events(epoch, train, validation, finding)
                exploding = train.grad is not None and train.grad.has_exploding
                if finding is not None and good is not None:
                    decision = Decision(op=Op.WAIT, reason="the epoch is undone")
                    parts = {"rollback": -config.governor.rollback_penalty}
                    decided.append((decision.op.name, parts["rollback"]))
                    more = {"max_epochs": config.max_epochs, "reward": parts["rollback"], "reward_parts": parts}
                    hub.emit(epoch_event(epoch, _states(model), train, validation, decision, **more))
                    _report_numbers(model, troubles, exploding, epoch, hub)
                    _roll_back(episode, governor, good, finding, epoch, hub)
                    model = episode.model
                    del contributions[model.fossils :]  # of seeds that are no fossils any more
                    continue
                for slot in model.slots:
                    name = slot.state.slot
                    slot.observe(accuracy, validation.contribution(name), gradient_ratio(train.grad, name))
                signals = episode.tracker.update(
                    epoch=epoch,
                    max_epochs=config.max_epochs,
                    train_loss=train.loss,
                    train_accuracy=train.accuracy,
                    val_loss=validation.loss,
                    val_accuracy=accuracy,
                    slots=_states(model),
                )
                changes = [change for slot in model.slots for change in slot.step_epoch()]
                stepped = replace(signals, slots=_states(model))
                decision = policy.decide(stepped)
                parts = _reward(episode, stepped, decision)
                reward = math.fsum(parts.values())
                made, refused = _execute(episode, decision)
                changes += made
                decided.append((decision.op.name, reward))
                more = {"max_epochs": config.max_epochs, "reward": reward, "reward_parts": parts, "refused": refused}
                more["joint"] = _joint(validation)
                hub.emit(epoch_event(epoch, signals.slots, train, validation, decision, **more))
                for change in changes:
                    _follow(episode, change)
                    hub.emit(stage_event(epoch, change))
                    if change.stage is SeedStage.FOSSILIZED and change.before.contribution is not None:
                        contributions.append(change.before.contribution)
                _report_numbers(model, troubles, exploding, epoch, hub)
                _stop_if_bad(config, finding, epoch)
                good = _keep(episode, epoch, hub) or good
            test = evaluate(model, episode.test, config.train, task_type=episode.task.task_type, step=episode.step)
            status = "completed"
    except BaseException as error:
        kinds = ((KeyboardInterrupt, "interrupted"), (NonFiniteLossError, "nonfinite"), (BadNumbersError, "diverged"))
        status = next((name for kind, name in kinds if isinstance(error, kind)), "failed")
        why = str(error) or None
        raise
    finally:
        outcome: dict[str, Any] = {
            "accuracy": accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "fossils": model.fossils,
            "contributions": tuple(contributions),
            "action_counts": {op.name: sum(name == op.name for name, _ in decided) for op in Op},
            "rewards": tuple(reward for _, reward in decided),
            "seconds": time.perf_counter() - started,
        }
        ending = {"status": status, "error": why, "test": test and plain(test)}
        hub.emit(Event(EventType.RUN_FINISHED, epoch, ending | outcome))
    return EpisodeResult(model=model, test=test, **outcome)


def _run_started(episode: Episode, mode: str) -> Event:
    config, model = episode.config, episode.model
    data = {
        "mode": mode,
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
    optimizers, most = episode.optimizers, config.max_batches
    train = train_one_epoch(model, episode.train, optimizers, config.train, max_batches=most, **kept)
    check_fossils = epoch % config.growth.fossil_check_epochs == 0 or epoch == config.max_epochs
    ablated = [s.slot for s in _states(model) if s.alpha > 0 and (s.stage is not SeedStage.FOSSILIZED or check_fossils)]
    variants = {slot: {slot: 0.0} for slot in ablated}
    if len(ablated) > 1:
        variants[JOINT] = dict.fromkeys(ablated, 0.0)
    return train, evaluate(model, episode.validation, config.train, variants=variants, **kept)


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


def _follow(episode: Episode, change: StageChange) -> None:
    """Keep the optimizers in step with the seeds."""
    slot, optimizers, config = change.before.slot, episode.optimizers, episode.config
    gate, frozen, lr = f"{slot}.gate", config.growth.on_fossilize == "freeze", config.optim.seed_lr
    if change.stage is SeedStage.TRAINING:
        seated = episode.model.slot(slot)
        for group, module in ((slot, seated.seed), (gate, seated.gate)):
            if module is not None:
                parameters = [p for p in module.parameters() if p.requires_grad]
                optimizers.attach(group, make_optimizer(parameters, lr, config) if parameters else None)
    if change.stage is SeedStage.CULLED or (change.stage is SeedStage.FOSSILIZED and frozen):
        optimizers.detach(slot)
    if gate in optimizers and change.stage in (SeedStage.PROBATIONARY, SeedStage.CULLED):
        optimizers.detach(gate)


def _report_numbers(model: MorphModel, troubles: list[Event], exploding: bool, epoch: int, hub: TelemetryHub) -> None:
    """Report bad numbers, and each parameter's gradient where the level asks for it."""
    hub.tick()
    for event in troubles:
        hub.emit(event)
    if troubles or exploding:
        hub.escalate()
    if hub.collects(EventType.LAYER_GRADIENTS):
        names, parameters = zip(*model.named_parameters(), strict=True)
        (norms,) = compute_all(grad_stats([p.grad for p in parameters]).norms)  # a host sync
        hub.emit(Event(EventType.LAYER_GRADIENTS, epoch, {"norms": dict(zip(names, norms, strict=True))}))


def _stop_if_bad(config: RunConfig, finding: Finding | None, epoch: int) -> None:
    """End a run that by its policy must not go on: skipping helps no longer when the weights are bad themselves, and
    a rollback is none where there never was a good state."""
    policy = config.train.on_bad_numbers
    goes_on = policy == "warn" or (policy == "skip" and finding is not None and finding.kind != "nonfinite")
    if finding is not None and not goes_on:
        raise _ending(finding, epoch)


def _ending(finding: Finding, epoch: int, more: str = "") -> BadNumbersError:
    kind = NonFiniteLossError if finding.kind == "nonfinite" else BadNumbersError
    advice = "try a smaller learning rate, train.grad.clip_norm, or another train.on_bad_numbers"
    return kind(f"in epoch {epoch} {finding.message}{more}; {advice}")


def _keep(episode: Episode, epoch: int, hub: TelemetryHub) -> Snapshot | None:
    """The state to return to, where the policy wants one, it is time, and the weights are good."""
    governor, model = episode.config.governor, episode.model
    due = episode.config.train.on_bad_numbers == "rollback" and epoch % governor.snapshot_epochs == 0
    if not due or not weights_are_finite(model):
        return None
    hub.emit(Event(EventType.SNAPSHOT, epoch, {"device": governor.snapshot_device}))
    owned = (model, episode.optimizers, episode.tracker)
    return Snapshot(epoch, owned, resolve_device(governor.snapshot_device))


def _roll_back(
    episode: Episode, governor: Governor, good: Snapshot, finding: Finding, epoch: int, hub: TelemetryHub
) -> None:
    """Bring model, optimizers and tracker back; the batches that come next are others. The last one ends the run."""
    most, gone = episode.config.governor.max_rollbacks, _states(episode.model)
    if governor.rollbacks == most:
        raise _ending(finding, epoch, f", after {most} rollbacks")
    governor.rolled_back()
    episode.model, episode.optimizers, episode.tracker = good.restore()
    states = _states(episode.model)
    pairs = [(a, b) for a, b in zip(gone, states, strict=True) if (a.stage, a.seed_id) != (b.stage, b.seed_id)]
    undone = "".join(f", {a.slot} from {a.stage.name} to {b.stage.name}" for a, b in pairs)
    words = f"rolled back to the state after epoch {good.epoch} ({governor.rollbacks} of {most} times){undone}"
    data = {"to_epoch": good.epoch, "kind": finding.kind, "number": governor.rollbacks, "message": words}
    hub.emit(Event(EventType.ROLLBACK, epoch, data | {"slots": [state.to_plain() for state in states]}))


def _states(model: MorphModel) -> tuple[SlotState, ...]:
    return tuple(slot.state for slot in model.slots)
