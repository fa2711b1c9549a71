"""Events made of what a run measured and decided."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from esper_kernels import GradHealth, Measured
from esper_train.control.governor import Finding
from esper_train.control.policy import Decision
from esper_train.morph.lifecycle import SlotState, StageChange
from esper_train.telemetry.event import Event, EventType
from esper_train.train.results import EpochResult, EvalResult, LearnerResult, Measures


def epoch_event(
    epoch: int,
    slots: Sequence[SlotState],
    train: EpochResult,
    validation: EvalResult,
    decision: Decision,
    *,
    max_epochs: int,
    reward_parts: Mapping[str, float],
    refused: str | None = None,
    joint: Mapping[str, Any] | None = None,
) -> Event:
    """The event of an epoch; slots are as they were while it was trained and measured."""
    how = ("compiled", "compile_failure", "replayed", "not_replayed", "seconds")
    learners = {name: learner.grad for name, learner in train.learners.items()}
    data = {
        "train": plain(train) | {name: getattr(train, name) for name in how},
        "validation": plain(validation),
        "passes": 1 + len(validation.variants),
        "grad": None if train.grad is None else with_learners(asdict(train.grad), learners),
        "slots": [state.to_plain() for state in slots],
        "decision": asdict(decision) | {"op": decision.op.name},
        "seconds": train.seconds + validation.seconds,
        "max_epochs": max_epochs,
        "joint": joint,
        "refused": refused,
        "reward": math.fsum(reward_parts.values()),
        "reward_parts": dict(reward_parts),
    }
    return Event(EventType.EPOCH, epoch, data)


def with_learners(
    grad: dict[str, Any], learners: Mapping[str, GradHealth | None]
) -> dict[str, Any]:
    """The network's gradients, with those of what learned beside it among the groups."""
    apart = {name: asdict(health) for name, health in learners.items() if health is not None}
    return grad | {"groups": grad["groups"] | apart}


def trouble_events(
    epoch: int, train: EpochResult, validation: EvalResult, finding: Finding | None
) -> list[Event]:
    """Events about bad numbers in an epoch; each has a message."""
    found = []
    logits = train.nonfinite + validation.nonfinite
    parts: list[EpochResult | LearnerResult] = [train, *train.learners.values()]
    skipped = sum(part.skipped for part in parts)
    grads = [part.grad for part in parts if part.grad is not None]
    gradients = sum(grad.nan_count + grad.inf_count for grad in grads)
    if logits or gradients:
        words = f"{logits} rows of logits and {gradients} gradient entries were NaN or infinite"
        words += f", {skipped} steps were skipped" if skipped else ""
        data = {"logits": logits, "gradients": gradients, "skipped": skipped, "message": words}
        found.append(Event(EventType.NONFINITE, epoch, data))
    if bad := train.bad_targets + validation.bad_targets:
        words = f"{bad} rows were left out because their target is outside the classes"
        found.append(Event(EventType.BAD_TARGETS, epoch, {"rows": bad, "message": words}))
    return found + ([] if finding is None else [Event(EventType.FINDING, epoch, asdict(finding))])


def stage_event(epoch: int, change: StageChange) -> Event:
    """A slot's move; the other numbers are those of the stage it left."""
    before = change.before
    data = before.to_plain() | {
        "from": before.stage.name,
        "stage": change.stage.name,
        "reason": change.reason,
        "improvement": before.improvement,
        "total_improvement": before.total_improvement,
    }
    return Event(EventType.SEED_STAGE, epoch, data)


def refused_event(epoch: int, decision: Decision, reason: str) -> Event:
    """A decision that was not carried out, and why."""
    data = {
        "op": decision.op.name,
        "slot": decision.slot,
        "reason": reason,
        "message": f"{decision.op.name} was refused: {reason}",
    }
    return Event(EventType.REFUSED, epoch, data)


def plain(measures: Measures) -> dict[str, Any]:
    """Loss and counts as plain values. The accuracy is in percent, as in the metrics of earlier
    versions, and None where none was counted."""
    return {
        "loss": measures.loss,
        "accuracy": None if measures.accuracy is None else measures.points,
        "correct": measures.correct,
        "valid": measures.valid,
        **_measured(measures.measured),
    }


def _measured(measured: Measured) -> dict[str, Any]:
    """The measures that were taken, and the numbers that the report derives from them; empty
    without any."""
    found = {name: value for name, value in asdict(measured).items() if value is not None}
    if not found:
        return {}
    if measured.perplexity is not None:
        found["perplexity"] = measured.perplexity
    if classes := measured.per_class:
        found["per_class"] |= {"macro": classes.macro()._asdict()}
        found["per_class"] |= {"weighted": classes.weighted()._asdict()}
    if calibration := measured.calibration:
        found["calibration"] |= {"ece": calibration.ece, "mce": calibration.mce}
    return {"measures": found}
