"""Settings of the host network, of the seeds' stages and of the gates between them."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import (
    Count,
    CountOrNone,
    CountOrZero,
    CountOrZeroOrNone,
    Factor,
    PositiveOrZero,
    Settings,
    Share,
    require,
)


@dataclass(frozen=True, kw_only=True)
class HostConfig(Settings, table="host."):
    """Size of the host network that a task builds."""

    width: CountOrNone = None
    """CNN: channels of the first block, each further one doubles them. Sequence models: size of an
    embedding. None takes the task's default."""
    depth: CountOrNone = None
    """Number of blocks; None takes the task's default."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig(Settings, table="growth."):
    """Thresholds of the quality gates and lengths of the stages. Accuracy in percentage points,
    time in epochs, whatever the length of the run."""

    window: Count = 5
    """Epochs over which the gates average."""
    blending_potential: float = -1.0
    """G2, which refuses clear harm only: the seed's mean potential, in percentage points, must
    be at least this."""
    blending_loss_change: float = 0.05
    """G2: the mean change in validation loss at alpha 1, in nats, must be below this."""
    training_min_epochs: CountOrZero = 5
    """G2: the fewest epochs in TRAINING; never fewer than `window`."""
    training_timeout: Count = 15
    """A seed that has not reached BLENDING after this many epochs is culled."""
    blending_epochs: Count = 5
    """Epochs over which alpha rises from 0 to 1 if it never has to wait."""
    blending_cost: PositiveOrZero = 1.0
    """Alpha waits while accuracy is this many points below its mean before blending."""
    blending_timeout: Count = 20
    """A seed that is still in BLENDING after this many epochs is culled."""
    probation_min_epochs: CountOrZero = 3
    """G3: the fewest epochs in BLENDING."""
    probation_alpha: Share = 0.95
    """G3: the smallest alpha, the seed's share of the slot's output."""
    fossilize_contribution: float = 0.5
    """G5: the seed's mean contribution, in percentage points, must be at least this."""
    fossilize_errors: PositiveOrZero = 1.0
    """G5: mean accuracy may be below its mean before blending by this many standard errors of the
    paired difference."""
    probation_timeout: Count = 16
    """Epochs after which a seed on probation is culled. The network comes to depend on a seed
    gradually, so its contribution is still rising in the first epochs."""
    harm: PositiveOrZero = 3.0
    """A seed with alpha above 0 is culled if accuracy stays this many points below its mean before
    blending for `governor.patience` epochs in a row."""
    embargo_epochs: CountOrZero = 5
    """Epochs for which the slot of a culled seed stays closed."""
    undo_wait: CountOrZero = 5
    """Epochs without germination after the first seed that was undone. Each further one doubles the
    wait, ..."""
    undo_wait_ceiling: CountOrZero = 80
    """... up to this many epochs; a seed that is kept resets it to `undo_wait`."""
    max_seeds: CountOrZeroOrNone = None
    """The largest number of seeds at a time, fossilized ones included; None allows one per slot."""
    fossil_check_epochs: Count = 5
    """Epochs between two measurements of a fossilized seed's contribution."""
    incubation: Literal["closed", "straight_through"] = "closed"
    """How a seed in TRAINING learns. closed: by its own effect on the loss at alpha 1, beside the
    network. straight_through: from the gradient of a value on which it has no effect, as in the
    audited system; its weights can run away."""
    isolate_training: bool = True
    """straight_through: the seed sends no gradients into the host."""
    on_fossilize: Literal["keep", "freeze"] = "keep"
    """keep: a fossilized seed continues to train with its own optimizer. freeze: it does not."""
    shrink_host: Factor = 1.0
    """When a seed is kept, the host's trainable matrices are multiplied by this once; 1 leaves them
    as they are. A host that predicts every training row right has hardly a gradient left. With
    smaller weights it is less sure, and learns to use its new part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("training_timeout", "probation_timeout"):
            value = getattr(self, name)
            what = (
                f"growth.{name} must not be below growth.window, {self.window}, or no seed "
                "could pass"
            )
            require(value >= self.window, what, value)

    def seed_life(self) -> int:
        """The fewest epochs from germination to the decision to keep the seed."""
        training = max(self.training_min_epochs, self.window)
        return training + max(self.blending_epochs, self.probation_min_epochs) + self.window
