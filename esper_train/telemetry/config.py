"""Settings of what a run reports."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import CountOrZero, Settings

TELEMETRY_LEVELS = ("off", "minimal", "normal", "debug")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(Settings, table="telemetry."):
    """What a run reports. Telemetry never changes what is trained."""

    level: Literal["off", "minimal", "normal", "debug"] = "normal"
    """off: nothing. minimal: the run, the seeds' lives, bad numbers. normal: each epoch too. debug:
    each parameter's gradient too."""
    lifecycle_only: bool = False
    """At every level, "off" included: the run's start and end and the seeds' lives, and nothing
    else."""
    escalation_epochs: CountOrZero = 5
    """After bad numbers or exploding gradients, report at debug level for so many epochs; 0 never
    does, and neither do the level "off" and `lifecycle_only`."""
    tensorboard: bool = False
    """Also write TensorBoard files, into tensorboard/ of the run directory."""
    wandb: bool = False
    """Also write Weights & Biases files, offline, into wandb/ of the run directory; `wandb sync`
    uploads them."""
