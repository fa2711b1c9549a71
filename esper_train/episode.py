"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows, epoch by epoch.

`cli` calls `build_episode` and `run_episode`; `run_heuristic_episode`, `train_heuristic` and `run_fit` do both for
those who import the package. Plain training is the same run with no slots and a controller that never acts.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from esper_train.config import OptimConfig, RunConfig
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Idle, Op, Policy
from esper_train.control.signals import SignalTracker
from esper_train.loop import EpochResult, EvalResult, Measures, evaluate, train_one_epoch
from esper_train.morph.blueprints import BlueprintRegistry, default_registry
from esper_train.morph.gates import gradient_ratio
from esper_train.morph.lifecycle import SeedStage, SlotState, StageChange
from esper_train.morph.model import MorphModel
from esper_train.optimizers import OptimizerRegistry
from esper_train.step import TrainStep, build_train_step
from esper_train.tasks import Task, get_task, load_splits, make_loader
from esper_train.telemetry.events import Event, EventType
from esper_train.telemetry.hub import TelemetryHub

EPISODE_SEED_STEP = 1000
"""Distance between the seeds of successive episodes."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the run cannot go on."""


@dataclass(kw_only=True)
class Episode:
    """Everything one run changes, and nothing another run can see."""

    config: RunConfig
    task: Task
    model: MorphModel
    optimizers: OptimizerRegistry
    tracker: SignalTracker
    step: TrainStep
    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    data_record: Mapping[str, Any]
    seeds_germinated: int = 0


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
    seconds: float
    model: MorphModel


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


def build_episode(
    config: RunConfig,
    *,
    task: Task | None = None,
    slots: Sequence[str],
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """Make everything a run owns. Raises `ValueError` for whatever in the config or the data cannot work."""
    task = task or get_task(config.task, config)
    device = resolve_device(config.device)
    splits = load_splits(task)
    with _random_state(config.seed, device):
        host = task.build_host(config.host).to(device)
    optim = config.optim
    host_optimizer = make_optimizer(host.parameters(), optim.host_lr, optim)
    step = build_train_step(task.task_type, config.train)
    step.backend(device)  # refuses here, not at the first batch, what cannot serve
    return Episode(
        config=config,
        task=task,
        model=MorphModel(
            host,
            slots,
            growth=config.growth,
            max_epochs=config.max_epochs,
            registry=registry or default_registry(),
        ),
        optimizers=OptimizerRegistry(host=host_optimizer),
        tracker=SignalTracker(
            plateau_threshold=config.policy.plateau_threshold, plateau_epochs=config.policy.plateau_epochs
        ),
        step=step,
        train=make_loader(splits.train, config.batch_size, shuffle_seed=config.seed),
        validation=make_loader(splits.validation, EVALUATION_BATCH),
        test=make_loader(splits.test, EVALUATION_BATCH),
        data_record=splits.record,
    )


def make_optimizer(parameters: Iterable[Tensor], lr: float, config: OptimConfig) -> Optimizer:
    """The optimizer of the host or of one seed."""
    if config.kind == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    return SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)


EVALUATION_BATCH = 512
"""Rows a batch where nothing is trained, so memory is all that limits it."""


def run_episode(episode: Episode, policy: Policy, hub: TelemetryHub | None = None, *, mode: str) -> EpisodeResult:
    """Run every epoch in the one order there is: train, evaluate, track, slots step, decide, execute.

    However the run ends, its last event is RUN_FINISHED with the status "completed", "interrupted", "nonfinite"
    or "failed"; what ended it is raised again.
    """
    config, model = episode.config, episode.model
    hub = hub or TelemetryHub()
    started = time.perf_counter()
    policy.reset()
    actions: Counter[str] = Counter({op.name: 0 for op in Op})
    contributions: list[float] = []
    accuracy, test, status, epoch = math.nan, None, "failed", 0
    outcome: dict[str, Any] = {}
    hub.emit(_run_started(episode, mode))
    try:
        with _random_state(config.seed + 1, next(model.parameters()).device):
            for epoch in range(1, config.max_epochs + 1):
                train, validation = _train_and_evaluate(episode)
                accuracy = validation.accuracy
                _observe(model, train, validation)
                signals = episode.tracker.update(
                    epoch=epoch,
                    max_epochs=config.max_epochs,
                    train_loss=train.loss,
                    train_accuracy=train.accuracy,
                    val_loss=validation.loss,
                    val_accuracy=validation.accuracy,
                    slots=_states(model),
                )
                changes = [change for slot in model.slots for change in slot.step_epoch()]
                decision = policy.decide(replace(signals, slots=_states(model)))
                made, refusal = _execute(episode, decision)
                changes += made
                actions[decision.op.name] += 1
                contributions += [
                    c.before.contribution
                    for c in changes
                    if c.stage is SeedStage.FOSSILIZED and c.before.contribution is not None
                ]
                for change in changes:
                    _follow(episode, change)
                hub.emit(_epoch_event(signals.slots, train, validation, decision, refusal, epoch, config))
                for change in changes:
                    hub.emit(_stage_event(change, epoch))
                _check_finite(train, validation, epoch, hub)
            test = evaluate(model, episode.test, config.train, task_type=episode.task.task_type, step=episode.step)
            status = "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except NonFiniteLossError:
        status = "nonfinite"
        raise
    finally:
        outcome = {
            "accuracy": accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "fossils": model.fossils,
            "contributions": tuple(contributions),
            "action_counts": dict(actions),
            "seconds": time.perf_counter() - started,
        }
        hub.emit(Event(EventType.RUN_FINISHED, epoch, {"status": status, "test": test and _plain(test), **outcome}))
    return EpisodeResult(model=model, test=test, **outcome)


def resolve_device(name: str) -> torch.device:
    """The torch device of this name; `ValueError` if it is none or cannot be used here."""
    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        usable += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} names no device; usable here: {', '.join(usable)}") from error
    if f"{device.type}:{device.index or 0}" not in (f"{u}:0" if ":" not in u else u for u in usable):
        raise ValueError(f"device {name!r} is not there; usable here: {', '.join(usable)}")
    return device


def _train_and_evaluate(episode: Episode) -> tuple[EpochResult, EvalResult]:
    config, model, task_type = episode.config, episode.model, episode.task.task_type
    train = train_one_epoch(
        model,
        episode.train,
        episode.optimizers,
        config.train,
        task_type=task_type,
        max_batches=config.max_batches,
        step=episode.step,
    )
    ablations = {state.slot: {state.slot: 0.0} for state in _states(model) if state.alpha > 0}
    validation = evaluate(
        model, episode.validation, config.train, task_type=task_type, variants=ablations, step=episode.step
    )
    return train, validation


def _observe(model: MorphModel, train: EpochResult, validation: EvalResult) -> None:
    """Give each slot the epoch's measurements; a slot without alpha has no contribution to measure."""
    for slot in model.slots:
        name = slot.state.slot
        without = validation.variants.get(name)
        contribution = None if without is None else validation.accuracy - without.accuracy
        slot.observe(validation.accuracy, contribution, gradient_ratio(train.grad, name))


def _execute(episode: Episode, decision: Decision) -> tuple[list[StageChange], str | None]:
    """Do what the controller asked; what the model refuses comes back as the reason in words."""
    model, slot = episode.model, decision.slot or ""
    try:
        match decision.op:
            case Op.GERMINATE:
                seed_id = f"seed_{episode.seeds_germinated}"
                made = model.germinate_seed(
                    decision.blueprint or "", seed_id, slot=slot, blend=decision.blend or "sigmoid"
                )
                episode.seeds_germinated += 1
                return made, None
            case Op.CULL:
                return model.cull_seed(slot=slot, reason=decision.reason), None
            case Op.FOSSILIZE:
                return model.fossilize_seed(slot=slot), None
            case _:
                return [], None
    except ValueError as refusal:
        return [], str(refusal)


def _follow(episode: Episode, change: StageChange) -> None:
    """Keep the optimizers in step with the seeds."""
    optim, slot = episode.config.optim, change.before.slot
    if change.stage is SeedStage.TRAINING:
        parameters = [p for p in episode.model.get_seed_parameters(slot) if p.requires_grad]
        optimizer = make_optimizer(parameters, optim.seed_lr, optim) if parameters else None
        episode.optimizers.attach(slot, optimizer)
    elif change.stage is SeedStage.CULLED or (
        change.stage is SeedStage.FOSSILIZED and episode.config.growth.on_fossilize == "freeze"
    ):
        episode.optimizers.detach(slot)


def _check_finite(train: EpochResult, validation: EvalResult, epoch: int, hub: TelemetryHub) -> None:
    """Report non-finite numbers; a loss that is one ends the run."""
    gradients = 0 if train.grad is None else train.grad.nan_count + train.grad.inf_count
    logits = train.nonfinite + validation.nonfinite
    if logits or gradients:
        hub.emit(Event(EventType.NONFINITE, epoch, {"logits": logits, "gradients": gradients}))
    if not (math.isfinite(train.loss) and math.isfinite(validation.loss)):
        raise NonFiniteLossError(
            f"the loss is not finite in epoch {epoch}: training {train.loss}, validation {validation.loss} "
            f"({logits} rows of logits and {gradients} gradient entries were NaN or infinite); "
            "try a smaller learning rate, or train.grad.clip_norm"
        )


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded inside, and as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type != "cpu" else []):
        torch.manual_seed(seed)
        yield


def _states(model: MorphModel) -> tuple[SlotState, ...]:
    return tuple(slot.state for slot in model.slots)


def _plain(measures: Measures) -> dict[str, object]:
    return {
        "loss": measures.loss,
        "accuracy": measures.accuracy,
        "correct": measures.correct,
        "valid": measures.valid,
    }


def _run_started(episode: Episode, mode: str) -> Event:
    config, model = episode.config, episode.model
    device = next(model.parameters()).device
    data = {
        "mode": mode,
        "task": episode.task.name,
        "seed": config.seed,
        "max_epochs": config.max_epochs,
        "device": str(device),
        "backend": episode.step.backend(device),
        "slots": [slot.state.slot for slot in model.slots],
        "data": dict(episode.data_record),
        "host_parameters": sum(p.numel() for p in model.get_host_parameters()),
    }
    return Event(EventType.RUN_STARTED, 0, data)


def _epoch_event(
    slots: Sequence[SlotState],
    train: EpochResult,
    validation: EvalResult,
    decision: Decision,
    refusal: str | None,
    epoch: int,
    config: RunConfig,
) -> Event:
    """The epoch's line; slots are as they were while it was trained and measured."""
    data = {
        "max_epochs": config.max_epochs,
        "train": _plain(train) | {"compiled": train.compiled, "compile_failure": train.compile_failure},
        "validation": _plain(validation),
        "grad": train.grad and asdict(train.grad),
        "slots": [asdict(state) | {"stage": state.stage.name} for state in slots],
        "decision": asdict(decision) | {"op": decision.op.name, "refused": refusal},
        "seconds": train.seconds + validation.seconds,
    }
    return Event(EventType.EPOCH, epoch, data)


def _stage_event(change: StageChange, epoch: int) -> Event:
    before = change.before
    data = asdict(before) | {
        "from": before.stage.name,
        "stage": change.stage.name,
        "reason": change.reason,
        "improvement": before.improvement,
        "total_improvement": before.total_improvement,
    }
    return Event(EventType.SEED_STAGE, epoch, data)
