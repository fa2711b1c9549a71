"""The events that a run reports: a few kinds, each a record of plain values. `run.records` makes
them from results."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class EventType(StrEnum):
    """Kinds of event."""

    RUN_STARTED = "run_started"
    EPOCH = "epoch"
    SEED_STAGE = "seed_stage"
    """A slot entered a stage."""
    NONFINITE = "nonfinite"
    """NaN or infinity in logits or gradients."""
    BAD_TARGETS = "bad_targets"
    """Rows were left out because of targets outside the classes."""
    FINDING = "finding"
    """The governor found that the losses have gone bad."""
    SNAPSHOT = "snapshot"
    """A checked state was stored, for a rollback to return to."""
    ROLLBACK = "rollback"
    """The run returned to such a state, with the slots as they were then."""
    REFUSED = "refused"
    """The controller asked for something that slots or gates do not allow."""
    UNDONE = "undone"
    """A seed failed after blending began, and the network returned to its state before that."""
    SEED_COST = "seed_cost"
    """Multiply-adds of a seed that begins to train, and those of the host."""
    LAYER_GRADIENTS = "layer_gradients"
    """Gradient norm of each parameter in the epoch's last batch."""
    INEXACT_RESUME = "inexact_resume"
    """A loader cannot promise that a resumed run gets the same batches."""
    RUN_FINISHED = "run_finished"


LIFECYCLE = frozenset(
    {
        EventType.RUN_STARTED,
        EventType.SEED_STAGE,
        EventType.REFUSED,
        EventType.UNDONE,
        EventType.RUN_FINISHED,
    }
)
LEVELS: Mapping[EventType, str] = {
    EventType.EPOCH: "normal",
    EventType.SEED_COST: "normal",
    EventType.SNAPSHOT: "debug",
    EventType.LAYER_GRADIENTS: "debug",
}
"""The lowest level at which an event is written, where that is not "minimal"."""


@dataclass(frozen=True)
class Event:
    """One record. `epoch` counts from 1; 0 is before the first."""

    type: EventType
    epoch: int
    data: Mapping[str, Any]

    def to_json(self) -> str:
        """One line of JSON. JSON has no NaN and no infinity: both become null."""
        return json.dumps(_finite({"event": self.type.value, "epoch": self.epoch, **self.data}))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
