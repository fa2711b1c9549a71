"""Settings of the heuristic controller and of the governor."""

from dataclasses import dataclass

from esper_train.base.settings import Count, CountOrZero, Decay, PositiveOrZero, Settings, require


@dataclass(frozen=True, kw_only=True)
class HeuristicConfig(Settings, table="policy."):
    """Rules of the heuristic controller and of the signal tracker that feeds it."""

    plateau_threshold: float = 0.5
    """Percentage points by which validation accuracy must exceed its last best to end a plateau."""
    plateau_epochs: CountOrZero = 3
    """Epochs of a plateau after which a seed is germinated."""
    max_live_seeds: Count = 1
    """At most this many seeds are undecided (not yet fossilized or culled) at a time."""
    min_epochs: CountOrZero = 5
    """No germination before this epoch."""
    life_margin: int = 7
    """No germination if fewer epochs are left than a seed's whole life plus this many."""
    blueprints: tuple[str, ...] = ()
    """Blueprints in the order in which they are tried; empty takes the registry's order for the
    host's topology."""
    blend: str = "sigmoid"
    cull_penalty: PositiveOrZero = 2.0
    """Added to a blueprint's penalty when a seed made from it is culled."""
    penalty_decay: Decay = 0.9
    """Factor by which a penalty shrinks per epoch, slowly enough to outlast the slot's embargo."""
    penalty_limit: PositiveOrZero = 1.0
    """A blueprint with at least this penalty is skipped while another has less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.blueprints)) < len(self.blueprints):
            raise ValueError(
                f"policy.blueprints names one more than once: {', '.join(self.blueprints)}"
            )


@dataclass(frozen=True, kw_only=True)
class GovernorConfig(Settings, table="governor."):
    """Settings that decide when a finite validation loss counts as gone bad, and what a rollback
    does. Time in epochs."""

    window: Count = 20
    """At most this many good epochs are what a loss is compared with."""
    min_history: Count = 5
    """Good epochs needed for a comparison."""
    sensitivity: PositiveOrZero = 6.0
    """Divergence: the loss is above that of a guess, above the mean of the window by this many
    standard deviations, ..."""
    multiplier: PositiveOrZero = 3.0
    """... and above this many times that mean."""
    patience: Count = 3
    """Suspicious epochs in a row that make a finding, or harmful ones that end a seed's trial
    (`growth.harm`); a loss that is not finite makes a finding at once."""
    snapshot_epochs: Count = 5
    """With policy "rollback": epochs between the checked states that are stored."""
    snapshot_device: str = "cpu"
    """Device on which the checked state is stored."""
    max_rollbacks: Count = 3
    """The next finding after this many rollbacks ends the run."""
    rollback_penalty: PositiveOrZero = 10.0
    """Subtracted from the reward of an epoch that is rolled back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.min_history <= self.window,
            "governor.min_history must not exceed window",
            self.min_history,
        )
