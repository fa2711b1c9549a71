"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows, epoch by epoch.

`cli` calls `build_episode` and `run_episode`; `run_heuristic_episode`, `train_heuristic` and `run_fit` do both for
those who import the package. Plain training is the same run with no slots and a controller that never acts.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from esper_kernels import compute_all, grad_stats
from esper_train.build import Episode, build_episode
from esper_train.checkpoint import Checkpoints
from esper_train.config import RunConfig
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
from esper_train.telemetry.events import Event, EventType, epoch_event, plain, stage_event
from esper_train.telemetry.hub import TelemetryHub

EPISODE_SEED_STEP = 1000
"""Distance between the seeds of successive episodes."""
JOINT = "+"
"""The variant without any of the seeds measured in an epoch; no slot has this name."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the run cannot go on."""


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
        NonFiniteLossError: the loss became NaN or infinite.
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


def run_episode(
    episode: Episode,
    policy: Policy,
    hub: TelemetryHub | None = None,
    *,
    mode: str,
    checkpoints: Checkpoints | None = None,
) -> EpisodeResult:
    """Run every epoch in the one order there is: train, evaluate, track, slots step, decide, execute.

    An episode restored from a checkpoint goes on with the epoch after it. However the run ends, its last event is
    RUN_FINISHED with the status "completed", "interrupted", "nonfinite" or "failed"; what ended it is raised again.
    """
    config, model, hub = episode.config, episode.model, hub or TelemetryHub()
    status, test = "failed", None
    epoch, started = episode.epoch, time.perf_counter() - episode.seconds
    if epoch == 0:
        policy.reset()
        hub.emit(run_started(episode, mode))
    try:
        with episode.random.active():
            for epoch in range(episode.epoch + 1, config.max_epochs + 1):
                train, validation = _train_and_evaluate(episode, epoch)
                episode.accuracy = accuracy = validation.accuracy
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
                reward = _reward(episode, stepped, decision)
                made, refused = _execute(episode, decision)
                changes += made
                episode.decided.append((decision.op.name, reward))
                more = {"joint": _joint(validation), "max_epochs": config.max_epochs, "reward": reward}
                hub.emit(epoch_event(epoch, signals.slots, train, validation, decision, **more, refused=refused))
                for change in changes:
                    _follow(episode, change, epoch)
                    hub.emit(stage_event(epoch, change))
                    if change.stage is SeedStage.FOSSILIZED and change.before.contribution is not None:
                        episode.contributions.append(change.before.contribution)
                _report_numbers(model, train, validation, epoch, hub)
                episode.epoch, episode.seconds = epoch, time.perf_counter() - started
                if checkpoints is not None:
                    checkpoints.take(episode, policy, hub, mode)
            batches = map(episode.stop.before, episode.test)
            test = evaluate(model, batches, config.train, task_type=episode.task.task_type, step=episode.step)
            status = "completed"
    except (KeyboardInterrupt, NonFiniteLossError) as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "nonfinite"
        raise
    finally:
        outcome: dict[str, Any] = {
            "accuracy": episode.accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "fossils": model.fossils,
            "contributions": tuple(episode.contributions),
            "action_counts": {op.name: sum(name == op.name for name, _ in episode.decided) for op in Op},
            "rewards": tuple(reward for _, reward in episode.decided),
            "seconds": time.perf_counter() - started,
        }
        hub.emit(Event(EventType.RUN_FINISHED, epoch, {"status": status, "test": test and plain(test), **outcome}))
        if checkpoints is not None:
            checkpoints.write()
    return EpisodeResult(model=model, test=test, **outcome)


def run_started(episode: Episode, mode: str) -> Event:
    """The first event of a run."""
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
    optimizers, most, batches = episode.optimizers, config.max_batches, map(episode.stop.before, episode.train)
    train = train_one_epoch(model, batches, optimizers, config.train, max_batches=most, **kept)
    check_fossils = epoch % config.growth.fossil_check_epochs == 0 or epoch == config.max_epochs
    ablated = [s.slot for s in _states(model) if s.alpha > 0 and (s.stage is not SeedStage.FOSSILIZED or check_fossils)]
    variants = {slot: {slot: 0.0} for slot in ablated}
    if len(ablated) > 1:
        variants[JOINT] = dict.fromkeys(ablated, 0.0)
    batches = map(episode.stop.before, episode.validation)
    return train, evaluate(model, batches, config.train, variants=variants, **kept)


def _joint(validation: EvalResult) -> dict[str, Any] | None:
    """What the seeds measured in this epoch contribute together, where there were several."""
    if JOINT not in validation.variants:
        return None
    slots = [name for name in validation.variants if name != JOINT]
    return {"slots": slots, "contribution": validation.contribution(JOINT)}


def _reward(episode: Episode, signals: Signals, decision: Decision) -> float:
    """What a decision earns, before it is executed: on the slot it names, or that of the first live seed."""
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


def _follow(episode: Episode, change: StageChange, epoch: int = 0) -> None:
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
    model: MorphModel, train: EpochResult, validation: EvalResult, epoch: int, hub: TelemetryHub
) -> None:
    """Report bad numbers, and each parameter's gradient where the level asks for it; a bad loss ends the run."""
    grad, logits = train.grad, train.nonfinite + validation.nonfinite
    gradients = 0 if grad is None else grad.nan_count + grad.inf_count
    hub.tick()
    if logits or gradients:
        hub.emit(Event(EventType.NONFINITE, epoch, {"logits": logits, "gradients": gradients}))
    if logits or gradients or (grad is not None and grad.has_exploding):
        hub.escalate()
    if hub.collects(EventType.LAYER_GRADIENTS):
        names, parameters = zip(*model.named_parameters(), strict=True)
        (norms,) = compute_all(grad_stats([p.grad for p in parameters]).norms)  # a host sync
        hub.emit(Event(EventType.LAYER_GRADIENTS, epoch, {"norms": dict(zip(names, norms, strict=True))}))
    if not (math.isfinite(train.loss) and math.isfinite(validation.loss)):
        raise NonFiniteLossError(
            f"the loss is not finite in epoch {epoch}: training {train.loss}, validation {validation.loss} "
            f"({logits} rows of logits were NaN or infinite); try a smaller learning rate, or train.grad.clip_norm"
        )


def _states(model: MorphModel) -> tuple[SlotState, ...]:
    return tuple(slot.state for slot in model.slots)
