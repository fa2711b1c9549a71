"""What a run reports: a few kinds of event, each a flat record that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class EventType(StrEnum):
    """Kinds of event. Each is emitted by `episode`."""

    RUN_STARTED = "run_started"
    EPOCH = "epoch"
    SEED_STAGE = "seed_stage"
    """A slot entered a stage."""
    NONFINITE = "nonfinite"
    """NaN or infinity in logits or gradients."""
    RUN_FINISHED = "run_finished"


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
