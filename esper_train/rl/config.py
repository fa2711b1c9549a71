"""Settings of the environment in which a controller learns, and of PPO."""

from dataclasses import dataclass
from typing import Literal

from esper_train.base.settings import (
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Settings,
    Share,
    require,
)
from esper_train.control.rewards import GAMMA


@dataclass(frozen=True, kw_only=True)
class RLConfig(Settings, table="rl."):
    """Settings of a learned controller: what it may do, and how PPO trains it. A step is one epoch
    of one host."""

    blends: tuple[str, ...] = ("sigmoid",)
    """Blends that it may choose from; each multiplies the number of germinations."""
    on_finding: Literal["end", "punish"] = "punish"
    """What a finding of the governor does to an episode: end it, or cost
    `governor.rollback_penalty` and let it go on where `train.on_bad_numbers` lets a run go on."""
    choose: Literal["sample", "best"] = "sample"
    """How a trained policy decides: it draws from its probabilities, as in training, or takes the
    most probable action."""
    hosts: Count = 8
    """Hosts that train in lockstep."""
    steps: Count = 16384
    """Steps of training in all, at least; the last rollout is finished."""
    rollout: Count = 128
    """Steps per host between two updates of the controller."""
    batch: Count = 256
    """Steps per minibatch of an update."""
    passes: Count = 8
    """Passes over a rollout per update."""
    learning_rate: Positive = 1e-3
    gamma: Share = GAMMA
    """Discount per step."""
    gae_lambda: Share = 0.95
    clip_range: Positive = 0.2
    entropy: PositiveOrZero = 0.01
    """Weight of the entropy bonus."""
    width: Count = 64
    """Units in each of the two hidden layers of the actor, and of the critic."""
    evaluate_every: CountOrZero = 10
    """Updates between two evaluations; 0 evaluates only at the end."""
    evaluations: Count = 4
    """Episodes of an evaluation, with seeds that training does not use."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, by the logger of Stable-Baselines3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.blends) > 0, "rl.blends must name at least one blend", self.blends)
        require(
            len(set(self.blends)) == len(self.blends),
            "rl.blends must name each blend once",
            self.blends,
        )
        collected = self.hosts * self.rollout
        require(collected > 1, "rl.hosts times rl.rollout must be at least 2", collected)
