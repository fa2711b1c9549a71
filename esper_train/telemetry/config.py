"""Settings of what a run reports."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import CountOrZero, Settings

TELEMETRY_LEVELS = ("off", "minimal", "normal", "debug")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(Settings, table="telemetry."):
    """What a run reports. Telemetry never changes what is trained."""

    level: Literal["off", "minimal", "normal", "debug"] = "normal"
    """minimal: the run, the stages of seeds, bad numbers. normal: also each epoch. debug: also each parameter's
    gradient."""
    lifecycle_only: bool = False
    """Report only the start and the end of the run and the stages of seeds."""
    escalation_epochs: CountOrZero = 5
    """Epochs to report at debug level after bad numbers or exploding gradients; 0 turns this off."""
    tensorboard: bool = False
    """Also write TensorBoard files, into tensorboard/ of the run directory."""
    wandb: bool = False
    """Also write Weights & Biases files, offline, into wandb/ of the run directory; `wandb sync` uploads them."""
