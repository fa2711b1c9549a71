"""Settings of the tasks: what they are told of their data, and what suits the runs of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper_train.base.settings import Settings

Plain = str | int | float | list[str] | Mapping[str, "Plain"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Settings):
    """What a task is told of its data."""

    data: str | None = None
    """Directory of the task's data, where it needs one."""
    vocab: int = 256
    """Size of a language task's vocabulary: 256 is bytes, more is a trained byte-pair encoding."""


PRESETS: Mapping[str, Mapping[str, Plain]] = MappingProxyType(
    {
        "cifar10": {"evaluation_batch": 128},
        # Seeds of either blueprint live whole lives with these, in two to three minutes of one core.
        "pysource": {
            "max_epochs": 60,
            "max_batches": 64,
            "batch_size": 32,
            "evaluation_batch": 64,
            "host": {"width": 24},
            "optim": {"kind": "adamw", "host_lr": 3e-3, "seed_lr": 3e-3, "weight_decay": 0.01},
            "growth": {
                "window": 3,
                "training_min_epochs": 3,
                "blending_epochs": 3,
                "fossilize_contribution": 0.1,
            },
            "policy": {
                "plateau_threshold": 1.5,
                "plateau_epochs": 2,
                "life_margin": 2,
                "blueprints": ["mlp", "attention"],
            },
        },
    }
)
"""Settings that suit a task, as a TOML file would give them; other tasks take the defaults."""
