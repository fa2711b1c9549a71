"""Settings of the tasks: options about their data, and settings of a run that suit each task."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper_train.base.settings import Count, Settings

Plain = str | int | float | list[str] | Mapping[str, "Plain"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Settings):
    """Options about the data of a task."""

    data: str | None = None
    """Directory with the data of the task, for tasks that need one."""
    vocab: Count = 256
    """Vocabulary size of a language task: 256 means bytes, more a trained byte-pair encoding."""


PRESETS: Mapping[str, Mapping[str, Plain]] = MappingProxyType(
    {
        "cifar10": {"evaluation_batch": 128},
        # Seeds of both blueprints go through all stages, in two to three minutes on one core.
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
"""Settings that suit a task, as in a TOML file. Tasks that are not listed use the defaults."""
