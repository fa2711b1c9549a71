"""Settings of what a run reports."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import CountOrZero, Settings

TELEMETRY_LEVELS = ("off", "minimal", "normal", "debug")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(Settings, table="telemetry."):
    """The events that a run reports. Telemetry never changes what is trained."""

    level: Literal["off", "minimal", "normal", "debug"] = "normal"
    """off: nothing. minimal: start and end of the run, stages of seeds, bad numbers. normal: also
    each epoch. debug: also each parameter's gradient norm."""
    lifecycle_only: bool = False
    """Report only the start and end of the run and the stages of the seeds, whatever the level."""
    escalation_epochs: CountOrZero = 5
    """Epochs for which everything is reported after bad numbers or exploding gradients. It has no
    effect with level "off" or `lifecycle_only`."""
    tensorboard: bool = False
    """Write TensorBoard files into tensorboard/ of the run directory."""
    wandb: bool = False
    """Write Weights & Biases files into wandb/ of the run directory, offline; `wandb sync` uploads
    them."""
