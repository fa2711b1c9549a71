"""What a decision earns in the epoch it is made, by parts; getting better is positive in each of
the `REWARDS`.

Accuracies, contributions and improvements are percentage points, losses nats; None is "not
measured".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from esper_train.base.settings import Settings
from esper_train.control.policy import Op
from esper_train.control.signals import Signals
from esper_train.morph.lifecycle import SeedStage, SlotState

GAMMA = 0.995
"""Discount of the next epoch; unless a learner uses the same, shaping changes which policy is
best."""
POTENTIALS: Mapping[int, float] = {2: 1.0, 3: 2.0, 4: 3.5, 6: 5.5, 7: 6.0}
"""What having come to a stage is worth, by its number; the others are worth nothing."""
MAX_EPOCH_POTENTIAL = 2.0
COSTS: Mapping[Op, float] = {Op.WAIT: 0.0, Op.GERMINATE: 0.02, Op.FOSSILIZE: 0.01, Op.CULL: 0.005}
WORTH_KEEPING = 1.0
"""Least contribution that fossilizing is rewarded for, least improvement that a fossil is."""
Parts = dict[str, float]
LOSS_TARGET = 0.13
LOSS_CHANGE = 0.043
"""A loss to reach, and by how much it may change in an epoch, as shares of the loss of a guess."""


class SeedInfo(NamedTuple):
    """What a reward needs to know of a seed; stages by number, 0 is none."""

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

    `total_params` are of the seeds alone. `num_fossilized_seeds` has no effect: fossils count if
    they improved.
    """
    config = config or ContributionReward()
    seed = seed_info or SeedInfo(0, None, None, 0)
    # an improvement that was not measured speaks against nothing
    gained = math.inf if seed.total_improvement is None else seed.total_improvement
    progress = None if acc_at_germination is None else val_acc - acc_at_germination
    credit = config.proxy * max(0.0, acc_delta or 0.0) if seed_info else 0.0
    if seed_contribution is not None:
        credit = _credit(seed_contribution, progress, gained, config.dependency)
    if seed.stage == SeedStage.FOSSILIZED or (action is Op.FOSSILIZE and gained < 0):
        credit = 0.0
    warning = 0.0
    epochs = seed.epochs_in_stage
    if seed.stage == SeedStage.BLENDING and gained < 0:
        warning = 0.1 + min(0.05 * epochs, 0.3)
    elif seed.stage == SeedStage.PROBATIONARY and action is Op.WAIT and epochs >= 2 and credit > 0:
        warning = min(3 ** (epochs - 2), config.max_indecision)
    final = config.final_accuracy * val_acc + config.final_fossil * num_contributing_fossilized
    parts = {
        "attribution": -credit if action is Op.CULL else credit,
        "warning": -warning,
        "shaping": config.shaping * _potential_gain(seed, config.epoch_potential),
        "rent": -min(config.rent * _growth(total_params, host_params), config.max_rent),
        "operation": _operation(action, seed, seed_contribution, gained, config),
        "final": final if epoch == max_epochs else 0.0,
    }
    reward = math.fsum(parts.values())
    return (reward, parts) if return_components else reward


def _credit(contribution: float, progress: float | None, gained: float, dependency: float) -> float:
    """A seed's contribution, but less where the accuracy did not rise with it: then others only
    depend on it."""
    if contribution < 0:
        return contribution
    mean = 0.5 * contribution if progress is None else math.sqrt(max(0.0, progress) * contribution)
    earned = min(contribution, mean)
    if gained < 0:
        return earned / (1.0 + math.exp(min(-10.0 * gained, 700.0)))
    suspicion = (
        contribution / 10.0 if gained <= 0.1 else max(0.0, contribution / gained - 5.0) / 15.0
    )
    return earned - (dependency * min(1.0, suspicion) if contribution > 1.0 else 0.0)


def _operation(
    op: Op, seed: SeedInfo, contribution: float | None, gained: float, config: ContributionReward
) -> float:
    """What an operation earns, or loses where it is wrong or impossible (the first rule that
    applies), and costs."""
    c = math.nan if contribution is None else contribution  # NaN fits no rule
    empty = seed.stage == 0
    on_probation = seed.stage == SeedStage.PROBATIONARY
    fossil = seed.stage == SeedStage.FOSSILIZED
    newborn = seed.seed_age_epochs < 1
    germination = config.shaping * GAMMA * POTENTIALS[SeedStage.GERMINATED]
    harm = (
        -0.5 - min(-0.2 * gained, 1.0) - (config.dependency if c > 0.1 and gained < -0.2 else 0.0)
    )
    bonus = (0.5 + 0.1 * c) * min(1.0, seed.epochs_in_stage / 5)
    loss = -0.3 - 0.05 * c
    rules: Mapping[Op, list[tuple[bool, float]]] = {
        Op.WAIT: [],
        Op.GERMINATE: [(empty, germination), (True, -0.3)],
        Op.FOSSILIZE: [
            (not on_probation, -1.0),
            (gained < 0, harm),
            (c >= WORTH_KEEPING, bonus),
            (True, -0.2),
        ],
        Op.CULL: [
            (empty, -0.2),
            (fossil, -1.0),
            (newborn, -0.3),
            (c >= 0, loss),
            (c < -0.5, 0.3),
            (c < 0, 0.1),
        ],
    }
    return next((value for applies, value in rules[op] if applies), 0.0) - COSTS[op]


def _potential_gain(seed: SeedInfo, epoch_potential: float = 0.0) -> float:
    """GAMMA times the potential now minus that an epoch ago: over a seed's life all but the ends
    cancels."""
    epochs = seed.epochs_in_stage
    then = (
        (seed.stage, epochs - 1) if epochs else (seed.previous_stage, seed.previous_epochs_in_stage)
    )
    times = ((seed.stage, epochs), then)
    after, before = (
        POTENTIALS.get(s, 0.0) + min(epoch_potential * n, MAX_EPOCH_POTENTIAL) for s, n in times
    )
    return GAMMA * after - before


def _growth(seed_parameters: int, host_parameters: int) -> float:
    return (
        math.log1p(seed_parameters / host_parameters)
        if min(seed_parameters, host_parameters) > 0
        else 0.0
    )


def shaped_reward(op: Op, state: SlotState, signals: Signals, host_parameters: int) -> Parts:
    """The contribution reward."""
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
    """In the last epoch the best accuracy, 0 to 1, less 0.1 for each 500,000 seed parameters, at
    least -1."""
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
    """The fall of the validation loss, a rise counting half; in the last epoch the share of the way
    to the target.

    The task's own scale: ln of the number of classes, the loss of a guess.
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
    "shaped": shaped_reward,
    "sparse": sparse_reward,
    "minimal": minimal_reward,
    "loss": loss_reward,
}
"""Each takes an operation, the slot it is about, the epoch as the controller saw it, and the host's
parameters, and gives the parts whose sum is the reward."""
