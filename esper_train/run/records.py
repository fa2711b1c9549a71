"""Events made of what a run measured and decided."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from esper_train.control.governor import Finding
from esper_train.control.policy import Decision
from esper_train.morph.lifecycle import SlotState, StageChange
from esper_train.telemetry.event import Event, EventType
from esper_train.train.loop import EpochResult, EvalResult, Measures


def epoch_event(
    epoch: int, slots: Sequence[SlotState], train: EpochResult, validation: EvalResult, decision: Decision, **more: Any
) -> Event:
    """The epoch's line; slots are as they were while it was trained and measured."""
    how = ("compiled", "compile_failure", "replayed", "not_replayed")
    data = {
        "train": plain(train) | {name: getattr(train, name) for name in how},
        "validation": plain(validation),
        "grad": train.grad and asdict(train.grad),
        "slots": [state.to_plain() for state in slots],
        "decision": asdict(decision) | {"op": decision.op.name},
        "seconds": train.seconds + validation.seconds,
    }
    return Event(EventType.EPOCH, epoch, data | more)


def trouble_events(epoch: int, train: EpochResult, validation: EvalResult, finding: Finding | None) -> list[Event]:
    """What was wrong with the numbers of an epoch; each event says so in words too."""
    found = []
    grad, logits, skipped = train.grad, train.nonfinite + validation.nonfinite, train.skipped
    gradients = 0 if grad is None else grad.nan_count + grad.inf_count
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


def plain(measures: Measures) -> dict[str, Any]:
    """Loss and counts as plain values."""
    return {key: getattr(measures, key) for key in ("loss", "accuracy", "correct", "valid")}
