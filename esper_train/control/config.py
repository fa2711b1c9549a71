"""Settings of the heuristic controller and of the governor."""

from dataclasses import dataclass

from esper_train.base.settings import Count, CountOrZero, Decay, PositiveOrZero, Settings, require


@dataclass(frozen=True, kw_only=True)
class HeuristicConfig(Settings, table="policy."):
    """Rules of the heuristic controller and of the signal tracker that feeds it."""

    plateau_threshold: float = 0.5
    """Percentage points by which validation accuracy must beat its last best to end a plateau."""
    plateau_epochs: CountOrZero = 3
    """Length of a plateau after which a seed is germinated."""
    max_live_seeds: Count = 1
    """Seeds whose fate is open at most at a time."""
    min_epochs: CountOrZero = 5
    """No germination before this epoch."""
    life_margin: int = 7
    """No germination when fewer epochs than a whole seed life plus this many are left."""
    blueprints: tuple[str, ...] = ()
    """Rotation of blueprints, first choice first; empty takes the registry's order for the host's
    topology."""
    blend: str = "sigmoid"
    cull_penalty: PositiveOrZero = 2.0
    """Added to a blueprint's penalty when a seed made from it is culled."""
    penalty_decay: Decay = 0.9
    """Factor a penalty keeps each epoch; slow enough that a penalty outlives the slot's embargo."""
    penalty_limit: PositiveOrZero = 1.0
    """A blueprint with at least this penalty is passed over while another is below it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.blueprints)) < len(self.blueprints):
            raise ValueError(
                f"policy.blueprints names one more than once: {', '.join(self.blueprints)}"
            )


@dataclass(frozen=True, kw_only=True)
class GovernorConfig(Settings, table="governor."):
    """When a finite validation loss counts as gone bad, and what a rollback does. Time in
    epochs."""

    window: Count = 20
    """Good epochs that a loss is compared with, at most."""
    min_history: Count = 5
    """Good epochs needed for a comparison."""
    sensitivity: PositiveOrZero = 6.0
    """Divergence: worse than guessing, above the mean of the window by so many standard deviations,
    ..."""
    multiplier: PositiveOrZero = 3.0
    """... and above so many times that mean."""
    patience: Count = 3
    """Suspicious epochs in a row that make a finding, or harmful ones that end a seed's trial
    (`growth.harm`); a loss that is not finite makes a finding at once."""
    snapshot_epochs: Count = 5
    """With rollback, keep a checked state every so many epochs."""
    snapshot_device: str = "cpu"
    """Where it is kept."""
    max_rollbacks: Count = 3
    """The finding after so many rollbacks ends the run."""
    rollback_penalty: PositiveOrZero = 10.0
    """Taken from the reward of an epoch that is rolled back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.min_history <= self.window,
            "governor.min_history must not exceed window",
            self.min_history,
        )
