"""Settings of the host network, of the seeds' stages and of the gates between them."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import (
    Count,
    CountOrNone,
    CountOrZero,
    CountOrZeroOrNone,
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
    """Epochs over which the gates take their means."""
    blending_potential: float = -1.0
    """G2, which refuses clear harm only: mean rise in validation accuracy that the seed would bring
    at alpha 1, at least."""
    blending_loss_change: float = 0.05
    """G2: the mean change that it would bring in validation loss must be below this, in nats."""
    training_min_epochs: CountOrZero = 5
    """G2: epochs in TRAINING, at least; as many as the window are needed in any case."""
    training_timeout: Count = 15
    """A seed that has not reached BLENDING after this many epochs is culled."""
    blending_epochs: Count = 5
    """Epochs over which alpha rises from 0 to 1, where it never has to wait."""
    blending_cost: PositiveOrZero = 1.0
    """Alpha waits while accuracy is this far below its mean of the window before blending."""
    blending_timeout: Count = 20
    """A seed that is still in BLENDING after this many epochs is culled."""
    probation_min_epochs: CountOrZero = 3
    """G3: epochs in BLENDING."""
    probation_alpha: Share = 0.95
    """G3: share of the seed in the slot's output."""
    fossilize_contribution: float = 0.5
    """G5: mean of validation accuracy with the seed minus accuracy without it."""
    fossilize_errors: PositiveOrZero = 1.0
    """G5: the mean accuracy of the window may be below that of the window before blending by so
    many standard errors of the paired difference."""
    probation_timeout: Count = 8
    """Epochs after which a seed on probation is culled."""
    harm: PositiveOrZero = 3.0
    """A seed with alpha above 0 is culled where accuracy stays this far below its mean before
    blending for `governor.patience` epochs in a row."""
    embargo_epochs: CountOrZero = 5
    """Epochs for which the slot of a culled seed stays closed."""
    undo_wait: CountOrZero = 5
    """Epochs without germination after the first seed whose effect was undone. Each further one
    doubles the wait, ..."""
    undo_wait_ceiling: CountOrZero = 80
    """... up to this; a seed that is kept brings it back to `undo_wait`."""
    max_seeds: CountOrZeroOrNone = None
    """Seeds seated at most at a time, fossilized ones included; None allows one in each slot."""
    fossil_check_epochs: Count = 5
    """A fossilized seed's contribution is measured again every so many epochs."""
    incubation: Literal["closed", "straight_through"] = "closed"
    """How a seed in TRAINING learns. closed: by its own effect on the loss at alpha 1, beside the
    network. straight_through: from the gradient of a value on which it has no effect, as in the
    audited system; its weights can run away."""
    isolate_training: bool = True
    """straight_through: the seed sends no gradients into the host."""
    on_fossilize: Literal["keep", "freeze"] = "keep"
    """A fossilized seed keeps training with its own optimizer, or is frozen."""

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
        """Fewest epochs from germination to the verdict."""
        training = max(self.training_min_epochs, self.window)
        return training + max(self.blending_epochs, self.probation_min_epochs) + self.window
