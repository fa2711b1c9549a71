"""The reward of a decision in the epoch in which it is made, as named parts that add up to it.

Improvement is positive in every one of the `REWARDS`. Accuracies, contributions and improvements
are percentage points, losses are nats; None means "not measured".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from esper_train.base.settings import Settings
from esper_train.control.policy import Op
from esper_train.control.signals import Signals
from esper_train.morph.lifecycle import SeedStage, SlotState

__all__ = [
    "COSTS",
    "GAMMA",
    "LOSS_CHANGE",
    "LOSS_TARGET",
    "MAX_EPOCH_POTENTIAL",
    "POTENTIALS",
    "REWARDS",
    "WORTH_KEEPING",
    "ContributionReward",
    "Parts",
    "RewardMode",
    "SeedInfo",
    "compute_contribution_reward",
    "loss_reward",
    "minimal_reward",
    "shaped_reward",
    "sparse_reward",
]

GAMMA = 0.995
"""Discount per epoch. Shaping keeps the best policy the best only for a learner with the same
discount."""
POTENTIALS: Mapping[int, float] = {2: 1.0, 3: 2.0, 4: 3.5, 6: 5.5, 7: 6.0}
"""Potential of each stage, by its number; 0 for the others."""
MAX_EPOCH_POTENTIAL = 2.0
COSTS: Mapping[Op, float] = {Op.WAIT: 0.0, Op.GERMINATE: 0.02, Op.FOSSILIZE: 0.01, Op.CULL: 0.005}
WORTH_KEEPING = 1.0
"""Points of contribution from which fossilizing is rewarded, and of improvement from which a fossil
counts at the end."""
Parts = dict[str, float]
LOSS_TARGET = 0.13
LOSS_CHANGE = 0.043
"""A loss to reach, and a typical change per epoch, as fractions of the loss of a random guess."""


class RewardMode(StrEnum):
    """The kinds of reward: the keys of `REWARDS` and the values of `RunConfig.reward`."""

    SHAPED = "shaped"
    SPARSE = "sparse"
    MINIMAL = "minimal"
    LOSS = "loss"


class SeedInfo(NamedTuple):
    """The facts about a seed that a reward needs. Stages are numbers; 0 means no seed."""

    stage: int
    improvement_since_stage_start: float | None
    total_improvement: float | None
    epochs_in_stage: int
    seed_params: int = 0
    previous_stage: int = 0
    previous_epochs_in_stage: int = 0
    seed_age_epochs: int = 0

    @classmethod
    def from_state(cls, state: SlotState) -> "SeedInfo | None":
        """The seed in a slot, None if there is none."""
        before = (state.previous_stage or 0, state.previous_epochs_in_stage)
        now = (
            state.stage,
            state.improvement,
            state.total_improvement,
            state.epochs_in_stage,
            state.seed_parameters,
        )
        return None if state.seed_id is None else cls(*now, *before, state.epochs_alive)


@dataclass(frozen=True, kw_only=True)
class ContributionReward(Settings):
    """Weights and limits of the contribution reward."""

    proxy: float = 0.3  # of a rise in accuracy, while no contribution is measured
    dependency: float = 0.3  # at most, for a contribution far above the improvement
    max_indecision: float = 10.0  # for waiting on probation
    shaping: float = 0.3  # of the potential gained
    epoch_potential: float = 0.3  # of each epoch in a stage
    rent: float = 0.5  # of log(1 + seed parameters / host parameters)
    max_rent: float = 8.0
    final_accuracy: float = 0.05
    final_fossil: float = 3.0


def compute_contribution_reward(
    action: Op,
    seed_contribution: float | None,
    val_acc: float,
    seed_info: SeedInfo | None,
    epoch: int,
    max_epochs: int,
    total_params: int = 0,
    host_params: int = 1,
    config: ContributionReward | None = None,
    acc_at_germination: float | None = None,
    acc_delta: float | None = None,
    return_components: bool = False,
    num_fossilized_seeds: int = 0,
    num_contributing_fossilized: int = 0,
) -> float | tuple[float, Parts]:
    """Reward `action` on the slot of `seed_info`; with `return_components`, (reward, its parts).

    `total_params` counts the parameters of the seeds alone. `num_fossilized_seeds` has no effect:
    only fossils that improved the network count, `num_contributing_fossilized`.
    """
    config = config or ContributionReward()
    seed = seed_info or SeedInfo(0, None, None, 0)
    # an improvement that was not measured limits nothing
    gained = math.inf if seed.total_improvement is None else seed.total_improvement
    progress = None if acc_at_germination is None else val_acc - acc_at_germination
    credit = config.proxy * max(0.0, acc_delta or 0.0) if seed_info else 0.0
    if seed_contribution is not None:
        credit = _credit(seed_contribution, progress, gained, config.dependency)
    if seed.stage == SeedStage.FOSSILIZED or (action is Op.FOSSILIZE and gained < 0):
        credit = 0.0
    final = config.final_accuracy * val_acc + config.final_fossil * num_contributing_fossilized
    parts = {
        "attribution": -credit if action is Op.CULL else credit,
        "warning": -_warning(action, seed, gained, credit, config.max_indecision),
        "shaping": config.shaping * _potential_gain(seed, config.epoch_potential),
        "rent": -min(config.rent * _growth(total_params, host_params), config.max_rent),
        "operation": _operation(action, seed, seed_contribution, gained, config),
        "final": final if epoch == max_epochs else 0.0,
    }
    reward = math.fsum(parts.values())
    return (reward, parts) if return_components else reward


def _credit(contribution: float, progress: float | None, gained: float, dependency: float) -> float:
    """The credit for a seed's contribution.

    It is less if accuracy did not rise with the contribution: then the rest of the network has only
    come to depend on the seed.
    """
    if contribution < 0:
        return contribution
    if progress is None:
        mean = 0.5 * contribution
    else:
        mean = math.sqrt(max(0.0, progress) * contribution)
    earned = min(contribution, mean)
    if gained < 0:
        return earned / (1.0 + math.exp(min(-10.0 * gained, 700.0)))
    if contribution <= 1.0:
        return earned
    if gained <= 0.1:
        suspicion = contribution / 10.0
    else:
        suspicion = max(0.0, contribution / gained - 5.0) / 15.0
    return earned - dependency * min(1.0, suspicion)


def _warning(op: Op, seed: SeedInfo, gained: float, credit: float, most: float) -> float:
    """The penalty for a blending seed that does harm, and for waiting on probation."""
    epochs = seed.epochs_in_stage
    if seed.stage == SeedStage.BLENDING and gained < 0:
        return 0.1 + min(0.05 * epochs, 0.3)
    if seed.stage == SeedStage.PROBATIONARY and op is Op.WAIT and epochs >= 2 and credit > 0:
        return min(3 ** (epochs - 2), most)
    return 0.0


def _operation(
    op: Op, seed: SeedInfo, contribution: float | None, gained: float, config: ContributionReward
) -> float:
    """The reward of an operation less its cost; negative where it is wrong or impossible."""
    c = math.nan if contribution is None else contribution  # NaN satisfies no comparison
    if op is Op.GERMINATE:
        germination = config.shaping * GAMMA * POTENTIALS[SeedStage.GERMINATED]
        value = germination if seed.stage == 0 else -0.3
    elif op is Op.FOSSILIZE:
        value = _fossilizing(seed, c, gained, config.dependency)
    elif op is Op.CULL:
        value = _culling(seed, c)
    else:
        value = 0.0
    return value - COSTS[op]


def _fossilizing(seed: SeedInfo, contribution: float, gained: float, dependency: float) -> float:
    if seed.stage != SeedStage.PROBATIONARY:
        return -1.0
    if gained < 0:
        relied_on = contribution > 0.1 and gained < -0.2
        return -0.5 - min(-0.2 * gained, 1.0) - (dependency if relied_on else 0.0)
    if contribution >= WORTH_KEEPING:
        return (0.5 + 0.1 * contribution) * min(1.0, seed.epochs_in_stage / 5)
    return -0.2


def _culling(seed: SeedInfo, contribution: float) -> float:
    if seed.stage == 0:
        return -0.2
    if seed.stage == SeedStage.FOSSILIZED:
        return -1.0
    if seed.seed_age_epochs < 1:
        return -0.3
    if contribution >= 0:
        return -0.3 - 0.05 * contribution
    if contribution < -0.5:
        return 0.3
    return 0.1 if contribution < 0 else 0.0


def _potential_gain(seed: SeedInfo, epoch_potential: float = 0.0) -> float:
    """GAMMA times the potential now, minus the potential one epoch ago.

    Summed over a seed's life, all but the first and the last potential cancel.
    """
    epochs = seed.epochs_in_stage
    if epochs:
        before = _potential(seed.stage, epochs - 1, epoch_potential)
    else:
        before = _potential(seed.previous_stage, seed.previous_epochs_in_stage, epoch_potential)
    return GAMMA * _potential(seed.stage, epochs, epoch_potential) - before


def _potential(stage: int, epochs: int, per_epoch: float) -> float:
    return POTENTIALS.get(stage, 0.0) + min(per_epoch * epochs, MAX_EPOCH_POTENTIAL)


def _growth(seed_parameters: int, host_parameters: int) -> float:
    if min(seed_parameters, host_parameters) <= 0:
        return 0.0
    return math.log1p(seed_parameters / host_parameters)


def shaped_reward(op: Op, state: SlotState, signals: Signals, host_parameters: int) -> Parts:
    """`compute_contribution_reward` of what was measured."""
    fossils = [s.total_improvement or 0.0 for s in signals.slots if s.stage is SeedStage.FOSSILIZED]
    result = compute_contribution_reward(
        op,
        state.contribution,
        signals.val_accuracy,
        SeedInfo.from_state(state),
        signals.epoch,
        signals.max_epochs,
        total_params=_seed_parameters(signals),
        host_params=host_parameters,
        acc_at_germination=state.accuracy_at_germination,
        acc_delta=signals.accuracy_delta,
        return_components=True,
        num_contributing_fossilized=sum(improvement >= WORTH_KEEPING for improvement in fossils),
    )
    assert isinstance(result, tuple)
    return result[1]


def sparse_reward(op: Op, state: SlotState, signals: Signals, host_parameters: int) -> Parts:
    """A reward in the last epoch only: the best accuracy, as a fraction, less 0.1 per 500,000 seed
    parameters, and at least -1."""
    reward = signals.best_val_accuracy / 100.0 - 0.1 * _seed_parameters(signals) / 500_000
    return {"final": max(-1.0, reward) if signals.epoch == signals.max_epochs else 0.0}


def minimal_reward(op: Op, state: SlotState, signals: Signals, host_parameters: int) -> Parts:
    """The sparse reward, less 0.1 for culling a seed younger than 5 epochs."""
    young = op is Op.CULL and state.seed_id is not None and state.epochs_alive < 5
    return {
        **sparse_reward(op, state, signals, host_parameters),
        "operation": -0.1 if young else 0.0,
    }


def loss_reward(op: Op, state: SlotState, signals: Signals, host_parameters: int) -> Parts:
    """The fall of the validation loss (a rise counts half) and, in the last epoch, how much of the
    way to the target loss was covered.

    Losses are relative to that of a random guess, ln(classes), so that every task has its scale.
    """
    baseline = signals.guess_loss
    target = LOSS_TARGET * baseline
    typical = LOSS_CHANGE * baseline
    falls = max(-5.0, min((signals.loss_delta or 0.0) / typical, 5.0))
    seed = SeedInfo.from_state(state)
    rent = min(0.05 * _growth(_seed_parameters(signals), host_parameters), 5.0)
    final = max(0.0, min((baseline - signals.val_loss) / (baseline - target), 1.0))
    return {
        "loss": 5.0 * falls if falls > 0 else 2.5 * falls,
        "shaping": 0.0 if seed is None else 0.1 * _potential_gain(seed),
        "rent": -rent if seed is None or seed.seed_age_epochs >= 3 else 0.0,
        "final": final if signals.epoch == signals.max_epochs else 0.0,
    }


def _seed_parameters(signals: Signals) -> int:
    return sum(state.seed_parameters for state in signals.slots)


REWARDS: Mapping[str, Callable[[Op, SlotState, Signals, int], Parts]] = {
    RewardMode.SHAPED: shaped_reward,
    RewardMode.SPARSE: sparse_reward,
    RewardMode.MINIMAL: minimal_reward,
    RewardMode.LOSS: loss_reward,
}
"""Each takes an operation, its slot, the epoch's signals and the host's number of parameters, and
returns the parts whose sum is the reward."""
