"""Rewards: the numbers of the audited system, and properties that hold for any numbers.

Long file: one golden number after the other, on shared seeds.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_train import RunConfig
from esper_train.control.policy import Op
from esper_train.control.rewards import (
    REWARDS,
    ContributionReward,
    RewardMode,
    SeedInfo,
    compute_contribution_reward,
)
from esper_train.control.signals import Signals
from esper_train.morph.lifecycle import SeedStage, SlotState

HOST = 6418
"""Parameters of the audited host; its seeds here have 2336, so rent is .5 * ln(1 + 2336/6418) =
.15520."""
TRAINING = SeedInfo(
    3, 1.0, 1.0, 2, 2336, previous_stage=2, previous_epochs_in_stage=1, seed_age_epochs=3
)
PROBATION = SeedInfo(
    6, 3.0, 3.0, 4, 2336, previous_stage=4, previous_epochs_in_stage=5, seed_age_epochs=12
)
BLENDING = PROBATION._replace(stage=4)
FOSSIL = PROBATION._replace(stage=7)


def reward(
    action: Op,
    seed: SeedInfo | None,
    contribution: float | None = None,
    epoch: int = 5,
    **more: object,
) -> float:
    """The reward at accuracy 60, 3 points above that at germination if there is a contribution;
    rent only with a seed."""
    start = None if contribution is None else 57.0
    arguments = {
        "total_params": 2336 if seed else 0,
        "host_params": HOST,
        "acc_at_germination": start,
    } | more
    return compute_contribution_reward(action, contribution, 60.0, seed, epoch, 25, **arguments)  # type: ignore[arg-type, return-value]


def parts(
    action: Op, seed: SeedInfo | None, contribution: float | None = None, **more: object
) -> dict[str, float]:
    total, result = reward(action, seed, contribution, return_components=True, **more)  # type: ignore[misc]
    assert total == pytest.approx(sum(result.values()), abs=1e-12)
    return result


# the audited numbers


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (0.0, reward(Op.WAIT, None)),
        # .3 * .995 for a seed's potential of 1, less the cost .02
        (0.2785, reward(Op.GERMINATE, None)),
        # .05 * 60
        (3.0, reward(Op.WAIT, None, epoch=25)),
        # .3 * 2 for the rise, .3 * (.995 * 2.6 - 2.3) = .0861 for the second epoch of training,
        # rent
        (0.5309, reward(Op.WAIT, TRAINING, acc_delta=2.0)),
        # the same without the rise, -.3 because the slot is taken, -.02
        (-0.3891, reward(Op.GERMINATE, TRAINING)),
        # 2 (of 3 points gained, 2 are the seed's), -3^2 for waiting, .3 * (.995 * 6.7 - 6.4) =
        # .07995, rent
        (-7.0753, reward(Op.WAIT, PROBATION, 2.0)),
        # 2, .07995, (.5 + .2) * 4/5 for fossilizing, -.01, rent
        (2.4747, reward(Op.FOSSILIZE, PROBATION, 2.0)),
        # -(-1), .3 * (.995 * 4.7 - 4.4) = .08295, +.3 for a harmful seed, -.005, rent
        (1.2227, reward(Op.CULL, BLENDING, -1.0)),
        # .3 * (.995 * 7.2 - 6.9) = .0792, rent
        (-0.0760, reward(Op.WAIT, FOSSIL)),
    ],
)
def test_reward_is_that_of_the_audited_system(expected: float, got: float) -> None:
    assert got == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("contribution", "start", "improvement", "expected"),
    [
        (-2.0, 57.0, 3.0, -2.0),
        (2.0, 57.0, 3.0, 2.0),  # the host did the rest
        (12.0, 57.0, 3.0, 6.0),  # sqrt(3 * 12)
        (2.0, 60.0, 3.0, 0.0),  # no progress, nothing to credit
        (2.0, 61.0, 3.0, 0.0),
        (2.0, None, 3.0, 1.0),
        (1.0, 57.0, -0.1, 1 / (1 + math.e)),  # 1 / (1 + exp(-10 * -.1))
        (2.0, 57.0, 0.1, 2.0 - 0.06),  # -.3 * 2/10
        (2.0, 57.0, 0.2, 2.0 - 0.1),  # 10 times the improvement: -.1 * (10 - 5) / 5
        (2.0, 57.0, 0.125, 2.0 - 0.22),  # 16 times: -.1 * 11/5
        (3.0, 57.0, 0.11, 3.0 - 0.3),  # 27 times: the most
        (2.0, 57.0, 0.0, 2.0 - 0.06),
        (1.2, 57.0, 0.1, 1.2 - 0.036),
        (1.0, 57.0, 0.1, 1.0),  # too little to be suspicious
        (2.0, 57.0, 0.4, 2.0),  # exactly 5 times is not yet
        (2.0, 57.0, None, 2.0),
        (0.5, 60.0, 3.0, 0.0),
    ],
)
def test_attribution_by_hand(
    contribution: float, start: float | None, improvement: float | None, expected: float
) -> None:
    seed = BLENDING._replace(total_improvement=improvement)
    got = parts(Op.WAIT, seed, contribution, acc_at_germination=start)["attribution"]
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("action", "seed", "contribution", "expected"),
    [
        (Op.WAIT, PROBATION, 2.0, 0.0),
        (Op.FOSSILIZE, None, None, -1.01),
        (Op.FOSSILIZE, BLENDING, 2.0, -1.01),
        (Op.FOSSILIZE, PROBATION, 0.9, -0.21),
        (Op.FOSSILIZE, PROBATION, None, -0.21),
        (Op.FOSSILIZE, PROBATION, 1.0, 0.47),  # (.5 + .1) * 4/5 - .01
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=0.0), 1.0, 0.47),
        (Op.FOSSILIZE, PROBATION._replace(epochs_in_stage=5), 3.0, 0.79),
        (Op.FOSSILIZE, PROBATION._replace(epochs_in_stage=9), 3.0, 0.79),
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-0.1), 2.0, -0.53),  # -.5 - .02 - .01
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-0.2), 2.0, -0.55),
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-0.3), 2.0, -0.87),
        # -.5 - .2 - .3 - .01
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-1.0), 2.0, -1.01),
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-1.0), 0.15, -1.01),
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-1.0), 0.1, -0.71),
        (Op.FOSSILIZE, PROBATION._replace(total_improvement=-9.0), 0.1, -1.51),
        (Op.CULL, None, None, -0.205),
        (Op.CULL, FOSSIL, 2.0, -1.005),
        (Op.CULL, BLENDING._replace(seed_age_epochs=0), -2.0, -0.305),
        (Op.CULL, BLENDING._replace(seed_age_epochs=1), -2.0, 0.295),
        (Op.CULL, BLENDING, None, -0.005),
        (Op.CULL, BLENDING, -0.5, 0.095),
        (Op.CULL, BLENDING, -0.6, 0.295),
        (Op.CULL, BLENDING, 0.0, -0.305),
        (Op.CULL, BLENDING, 4.0, -0.505),
    ],
)
def test_operation_by_hand(
    action: Op, seed: SeedInfo | None, contribution: float | None, expected: float
) -> None:
    assert parts(action, seed, contribution)["operation"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("seed", "contribution", "expected"),
    [
        (BLENDING._replace(total_improvement=-1.0, epochs_in_stage=1), 2.0, -0.15),
        (BLENDING._replace(total_improvement=-1.0, epochs_in_stage=9), 2.0, -0.4),
        (BLENDING._replace(total_improvement=0.5), 2.0, 0.0),
        (BLENDING._replace(total_improvement=0.0), 2.0, 0.0),
        (PROBATION._replace(epochs_in_stage=1), 2.0, 0.0),
        (PROBATION._replace(epochs_in_stage=2), 2.0, -1.0),
        (PROBATION._replace(epochs_in_stage=2), 0.5, -1.0),
        (PROBATION._replace(epochs_in_stage=2), 0.0, 0.0),
        (PROBATION._replace(epochs_in_stage=3), 2.0, -3.0),
        (PROBATION._replace(epochs_in_stage=5), 2.0, -10.0),
        # nobody would want to wait with this one
        (PROBATION._replace(epochs_in_stage=5), -2.0, 0.0),
    ],
)
def test_warning_by_hand(seed: SeedInfo, contribution: float, expected: float) -> None:
    assert parts(Op.WAIT, seed, contribution)["warning"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("improvement", [0.0, 0.5])
def test_fossilizing_what_made_nothing_worse_keeps_its_attribution(improvement: float) -> None:
    assert (
        parts(Op.FOSSILIZE, PROBATION._replace(total_improvement=improvement), 0.5)["attribution"]
        == 0.5
    )


def test_without_parameters_there_is_no_rent_and_a_host_of_unknown_size_has_one() -> None:
    """.5 * ln(1 + 1/1)."""
    assert compute_contribution_reward(Op.WAIT, None, 60.0, None, 5, 25) == 0.0
    assert compute_contribution_reward(Op.WAIT, None, 60.0, None, 5, 25, 1) == pytest.approx(
        -0.3465736, abs=1e-7
    )


def test_a_stage_just_entered_is_worth_more_than_the_one_left() -> None:
    """BLENDING 3.5 against TRAINING 2 and its 3 epochs: .3 * (.995 * 3.5 - 2.9)."""
    seed = BLENDING._replace(epochs_in_stage=0, previous_stage=3, previous_epochs_in_stage=3)
    assert parts(Op.WAIT, seed)["shaping"] == pytest.approx(0.17475, abs=1e-12)


def test_fossils_that_contribute_are_rewarded_in_the_last_epoch_only() -> None:
    fossils = {"num_fossilized_seeds": 3, "num_contributing_fossilized": 2}
    assert reward(Op.WAIT, None, epoch=25, **fossils) == pytest.approx(9.0)
    assert reward(Op.WAIT, None, epoch=24, **fossils) == 0.0


def test_weights_come_from_the_config() -> None:
    config = ContributionReward(proxy=1.0, shaping=0.0, max_rent=0.1)
    assert reward(Op.WAIT, TRAINING, acc_delta=2.0, config=config) == pytest.approx(1.9)
    assert reward(
        Op.WAIT, None, epoch=25, config=ContributionReward(final_accuracy=0.5)
    ) == pytest.approx(30.0)


# what holds for any numbers

points = st.floats(-100, 100)
seeds = st.builds(
    SeedInfo,
    stage=st.sampled_from([2, 3, 4, 6, 7]),
    improvement_since_stage_start=st.none() | points,
    total_improvement=st.none() | points | st.floats(-1e6, 1e6),
    epochs_in_stage=st.integers(0, 1000),
    previous_stage=st.sampled_from([0, 1, 2, 3, 4, 6]),
    previous_epochs_in_stage=st.integers(0, 1000),
    seed_age_epochs=st.integers(0, 1000),
)
contributions = st.none() | points


@given(
    st.sampled_from(Op),
    st.none() | seeds,
    contributions,
    st.none() | points,
    st.none() | points,
    st.sampled_from([1, 25]),
    st.integers(-1, 10**12),
    st.integers(-1, 10**12),
)
def test_reward_is_finite_and_the_sum_of_its_parts(
    action: Op,
    seed: SeedInfo | None,
    contribution: float | None,
    start: float | None,
    rise: float | None,
    epoch: int,
    total: int,
    host: int,
) -> None:
    more = {
        "acc_at_germination": start,
        "acc_delta": rise,
        "total_params": total,
        "host_params": host,
    }
    assert all(map(math.isfinite, parts(action, seed, contribution, epoch=epoch, **more).values()))


@given(seeds, contributions, points)
def test_cull_negates_the_attribution(
    seed: SeedInfo, contribution: float | None, rise: float
) -> None:
    culled, waited = (
        parts(op, seed, contribution, acc_delta=rise)["attribution"] for op in (Op.CULL, Op.WAIT)
    )
    assert culled == -waited


@given(seeds, contributions, st.floats(-100, -1e-6))
def test_fossilizing_what_made_the_accuracy_worse_earns_no_attribution_and_costs(
    seed: SeedInfo, contribution: float | None, improvement: float
) -> None:
    result = parts(
        Op.FOSSILIZE, seed._replace(total_improvement=improvement), contribution, acc_delta=1.0
    )
    assert result["attribution"] == 0.0
    assert result["operation"] < 0


@given(seeds, st.floats(0, 100), points)
def test_attribution_is_never_more_than_the_contribution(
    seed: SeedInfo, contribution: float, start: float
) -> None:
    assert (
        parts(Op.WAIT, seed, contribution, acc_at_germination=start)["attribution"] <= contribution
    )


@given(seeds, st.floats(-100, -1e-6))
def test_a_harmful_seed_is_better_culled_than_kept(seed: SeedInfo, contribution: float) -> None:
    seed = seed._replace(stage=4, seed_age_epochs=3)
    assert reward(Op.CULL, seed, contribution) > reward(Op.WAIT, seed, contribution)


@given(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 10**9))
def test_rent_grows_with_the_seeds_parameters_to_a_limit(fewer: int, more: int, host: int) -> None:
    low, high = (
        -parts(Op.WAIT, TRAINING, total_params=n, host_params=host)["rent"]
        for n in (fewer, fewer + more)
    )
    assert 0 <= low <= high <= 8
    assert low < high or low == 8 or more / host < 1e-6


@given(
    st.lists(st.tuples(st.sampled_from([2, 3, 4, 6]), st.integers(0, 20)), min_size=1, max_size=5)
)
def test_shaping_over_a_life_is_that_of_its_ends(stages: list[tuple[int, int]]) -> None:
    """The sum of gamma * now - before, discounted by .995 each epoch, leaves only the last and the
    first potential."""
    total = 0.0
    discount = 1.0
    before = (0, 0)
    potential = 0.0
    for stage, last in stages:
        for epoch in range(last + 1):
            seed = SeedInfo(stage, None, None, epoch, 0, *before)
            total += discount * parts(Op.WAIT, seed)["shaping"]
            discount *= 0.995
        before = (stage, last)
        potential = {2: 1.0, 3: 2.0, 4: 3.5, 6: 5.5}[stage] + min(0.3 * last, 2.0)
    assert total == pytest.approx(0.3 * discount * potential, abs=1e-9)


# the seed in a slot

STATE = SlotState(
    slot="mid",
    stage=SeedStage.BLENDING,
    seed_id="seed_1",
    epochs_in_stage=2,
    previous_stage=SeedStage.TRAINING,
    previous_epochs_in_stage=7,
    epochs_alive=9,
    seed_parameters=2336,
    accuracy=60.0,
    accuracy_at_germination=57.0,
    accuracy_at_stage_start=58.5,
    contribution=2.0,
)


def test_seed_info_of_a_slot() -> None:
    assert SeedInfo.from_state(STATE) == SeedInfo(4, 1.5, 3.0, 2, 2336, 3, 7, 9)


def test_seed_info_keeps_what_was_not_measured() -> None:
    info = SeedInfo.from_state(SlotState(slot="mid", stage=SeedStage.TRAINING, seed_id="s"))
    assert info == SeedInfo(3, None, None, 0)


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.EMBARGOED])
def test_a_slot_without_seed_has_no_seed_info(stage: SeedStage) -> None:
    assert SeedInfo.from_state(SlotState(slot="mid", stage=stage, epochs_in_stage=4)) is None


# the rewards by name

EMPTY = SlotState(slot="late")
KEPT = replace(
    STATE, slot="early", seed_id="seed_0", stage=SeedStage.FOSSILIZED, seed_parameters=1000
)
SIGNALS = Signals(
    epoch=5,
    max_epochs=25,
    train_loss=1.0,
    train_accuracy=70.0,
    val_loss=1.3,
    val_accuracy=60.0,
    loss_delta=0.3,
    accuracy_delta=2.0,
    best_val_loss=1.3,
    best_val_accuracy=75.0,
    plateau_epochs=0,
    guess_loss=10.0,
    slots=(KEPT, STATE, EMPTY),
)
LAST = replace(SIGNALS, epoch=25)


def earned(name: str, op: Op, state: SlotState, signals: Signals, host_parameters: int) -> float:
    return math.fsum(REWARDS[name](op, state, signals, host_parameters).values())


def test_shaped_is_the_contribution_reward_of_the_slot() -> None:
    """The fossil's 3 points make it contribute; all seeds pay rent."""
    for op in Op:
        expected = compute_contribution_reward(
            op,
            2.0,
            60.0,
            SeedInfo.from_state(STATE),
            25,
            25,
            3336,
            HOST,
            None,
            57.0,
            2.0,
            False,
            1,
            1,
        )
        assert earned("shaped", op, STATE, LAST, HOST) == expected


def test_shaped_counts_only_fossils_that_improved_by_a_point() -> None:
    enough, little = (replace(KEPT, accuracy_at_germination=start) for start in (59.0, 59.1))
    bonus, none = (
        earned("shaped", Op.WAIT, STATE, replace(LAST, slots=(fossil, STATE, EMPTY)), HOST)
        for fossil in (enough, little)
    )
    assert bonus - none == pytest.approx(3.0)


def test_sparse_is_the_best_accuracy_less_parameters_at_the_end() -> None:
    """3,336 parameters cost .1 * 3336 / 500000 = .0006672."""
    assert earned("sparse", Op.WAIT, STATE, SIGNALS, HOST) == 0.0
    assert earned("sparse", Op.WAIT, STATE, LAST, HOST) == pytest.approx(0.7493328, abs=1e-12)
    huge = replace(LAST, slots=(replace(KEPT, seed_parameters=10**9),))
    assert earned("sparse", Op.WAIT, STATE, huge, HOST) == -1.0


@pytest.mark.parametrize(
    ("op", "state", "expected"),
    [
        (Op.CULL, replace(STATE, epochs_alive=4), -0.1),
        (Op.CULL, replace(STATE, epochs_alive=5), 0.0),
        (Op.WAIT, replace(STATE, epochs_alive=4), 0.0),
        (Op.CULL, EMPTY, 0.0),
    ],
)
def test_minimal_is_sparse_and_punishes_culling_the_young(
    op: Op, state: SlotState, expected: float
) -> None:
    assert earned("minimal", op, state, SIGNALS, HOST) == pytest.approx(expected)
    end = earned("sparse", op, state, LAST, HOST)
    assert earned("minimal", op, state, LAST, HOST) == pytest.approx(end + expected)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [(1.29, 15.0), (2.58, 25.0), (-0.86, -5.0), (-9.0, -12.5), (0.0, 0.0), (None, 0.0)],
)
def test_loss_reward_is_positive_for_a_fall_of_the_loss(
    delta: float | None, expected: float
) -> None:
    """The unit is .043 of a guess's loss, 10; it is limited to 5 units, then multiplied by 5; a
    rise counts half."""
    bare = replace(SIGNALS, loss_delta=delta, slots=(EMPTY,))
    assert earned("loss", Op.WAIT, EMPTY, bare, HOST) == pytest.approx(expected)


def test_loss_reward_takes_rent_and_shapes_by_stages() -> None:
    """.05 * ln(1 + 3336/6418) = .0209285 after three epochs; .1 * (.995 * 3.5 - 3.5) = -.00175
    within a stage."""
    flat = replace(SIGNALS, loss_delta=None)
    assert earned("loss", Op.WAIT, STATE, flat, HOST) == pytest.approx(
        -0.00175 - 0.0209285, abs=1e-6
    )
    assert earned("loss", Op.WAIT, replace(STATE, epochs_alive=2), flat, HOST) == pytest.approx(
        -0.00175, abs=1e-6
    )
    at_three = earned("loss", Op.WAIT, replace(STATE, epochs_alive=3), flat, HOST)
    assert at_three == pytest.approx(-0.00175 - 0.0209285, abs=1e-6)
    assert earned("loss", Op.WAIT, EMPTY, flat, HOST) == pytest.approx(-0.0209285, abs=1e-6)
    huge = replace(flat, slots=(replace(KEPT, seed_parameters=10**60),))
    assert earned("loss", Op.WAIT, EMPTY, huge, HOST) == -5.0
    entered = replace(STATE, epochs_in_stage=0, epochs_alive=0)  # .1 * (.995 * 3.5 - 2)
    assert earned("loss", Op.WAIT, entered, flat, HOST) == pytest.approx(0.14825, abs=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [(5.65, 0.5), (0.1, 1.0), (12.0, 0.0)])
def test_loss_reward_ends_with_the_share_of_the_way_to_the_target(
    loss: float, expected: float
) -> None:
    """The way from a loss of 10 to the target of 1.3."""
    last = replace(LAST, loss_delta=None, val_loss=loss, slots=(EMPTY,))
    assert earned("loss", Op.WAIT, EMPTY, last, HOST) == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 10, 50257])
def test_loss_reward_takes_its_scale_from_the_number_of_classes(classes: int) -> None:
    """The loss falls by .043 of a guess's, which is half the way down to .13 of it."""
    guess = math.log(classes)
    last = replace(
        LAST, guess_loss=guess, val_loss=guess * 1.13 / 2, loss_delta=0.043 * guess, slots=(EMPTY,)
    )
    assert earned("loss", Op.WAIT, EMPTY, last, HOST) == pytest.approx(5.0 + 0.5)


@pytest.mark.parametrize("name", ["shaped", "sparse", "minimal", "loss"])
def test_a_better_epoch_never_earns_less(name: str) -> None:
    worse, better = (
        replace(
            LAST,
            val_accuracy=accuracy,
            best_val_accuracy=accuracy,
            accuracy_delta=accuracy - 60,
            val_loss=loss,
            loss_delta=1.5 - loss,
        )
        for accuracy, loss in ((50.0, 2.0), (70.0, 1.0))
    )
    state = replace(STATE, contribution=None)
    assert earned(name, Op.WAIT, state, better, HOST) > earned(name, Op.WAIT, state, worse, HOST)


def test_reward_modes_are_the_rewards_that_a_config_can_name() -> None:
    assert set(RewardMode) == REWARDS.keys()
    for mode in RewardMode:
        named = RunConfig(reward=mode).reward  # type: ignore[arg-type]
        assert named == mode
        assert type(named) is str  # a checkpoint and a file hold no enum
