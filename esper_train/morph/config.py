"""Settings of the host network, of the seeds' stages and of the gates between them."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import Count, CountOrNone, CountOrZero, Settings, Share


@dataclass(frozen=True, kw_only=True)
class HostConfig(Settings, table="host."):
    """Size of the host network that a task builds."""

    width: CountOrNone = None
    """CNN: channels of the first block, each further one doubles them. Sequence models: size of an embedding.
    None takes the task's default."""
    depth: CountOrNone = None
    """Number of blocks; None takes the task's default."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig(Settings, table="growth."):
    """Thresholds of the quality gates and lengths of the stages. Accuracy in percentage points, time in epochs."""

    blending_improvement: float = 0.5
    """G2: validation accuracy gained since the seed began to train."""
    blending_min_epochs: CountOrZero = 3
    """G2: epochs in TRAINING, at least; see also `training_dwell_fraction`."""
    blending_gradient_ratio: float = 0.05
    """G2: size-corrected gradient norm of the seed over that of the host."""
    probation_min_epochs: CountOrZero = 3
    """G3: epochs in BLENDING."""
    probation_alpha: Share = 0.95
    """G3: share of the seed in the slot's output."""
    fossilize_contribution: float = 1.0
    """G5: validation accuracy with the seed minus accuracy without it."""
    training_dwell_fraction: Share = 0.1
    """Share of the run a seed stays in TRAINING at least."""
    training_timeout: Count = 15
    """A seed that has not reached BLENDING after this many epochs, or twice the dwell, is culled."""
    blending_epochs: Count = 5
    """Epochs over which alpha rises from 0 to 1."""
    probation_timeout_fraction: Share = 0.1
    """Share of the run (5 epochs at least) after which a seed on probation is culled."""
    embargo_epochs: CountOrZero = 5
    """Epochs for which the slot of a culled seed stays closed."""
    max_seeds: int | None = None
    """Seeds seated at most at a time, fossilized ones included; None allows one in each slot."""
    fossil_check_epochs: Count = 5
    """A fossilized seed's contribution is measured again every so many epochs."""
    isolate_training: bool = True
    """In TRAINING the seed learns without sending gradients into the host."""
    on_fossilize: Literal["keep", "freeze"] = "keep"
    """A fossilized seed keeps training with its own optimizer, or is frozen."""

    def training_dwell(self, max_epochs: int) -> int:
        """Epochs a seed spends in TRAINING at least, in a run of `max_epochs`."""
        return max(1, int(max_epochs * self.training_dwell_fraction))

    def training_limit(self, max_epochs: int) -> int:
        """Epochs in TRAINING after which a seed is culled, in a run of `max_epochs`."""
        return max(self.training_timeout, 2 * self.training_dwell(max_epochs))

    def probation_timeout(self, max_epochs: int) -> int:
        """Epochs after which a seed on probation is culled, in a run of `max_epochs`."""
        return max(5, int(max_epochs * self.probation_timeout_fraction))

    def seed_life(self, max_epochs: int) -> int:
        """Fewest epochs from germination to a measured contribution at full alpha."""
        training = max(self.training_dwell(max_epochs), self.blending_min_epochs)
        return training + max(self.blending_epochs, self.probation_min_epochs) + 1
