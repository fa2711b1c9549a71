"""The whole life of a seed in a slot, epoch by epoch.

Long file: one slot and its fixtures serve all of these tests.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from esper_train.morph.blueprints import Blueprint
from esper_train.morph.lifecycle import LIVE, RefusedError, SeedStage, SlotState
from esper_train.morph.slot import SeedSlot
from tests.helpers.slots import (
    AFFINE,
    FASTEST_LIFE,
    HELPS,
    NOTHING,
    Affine,
    affine,
    empty_slot,
    epoch,
    features,
    moves,
    observe,
    slot_in,
    snapshot,
)


def test_germinate_makes_a_seed_of_the_slots_dtype() -> None:
    slot = empty_slot().double()
    slot.germinate(AFFINE, "s0")
    assert slot(features().double()).dtype == torch.float64


def test_restore_freezes_a_fossil_where_fossils_are_frozen() -> None:
    frozen, kept = (slot_in(SeedStage.FOSSILIZED, on_fossilize=how) for how in ("freeze", "keep"))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in kept.parameters())


def test_germinate_starts_training_at_once() -> None:
    slot = empty_slot()
    observe(slot, 40.0)
    assert moves(slot.germinate(AFFINE, "s0", "linear")) == [
        ("DORMANT", "GERMINATED", "affine seated"),
        ("GERMINATED", "TRAINING", "training begins"),
    ]
    assert slot.state == SlotState(
        slot="mid",
        stage=SeedStage.TRAINING,
        seed_id="s0",
        blueprint="affine",
        blend="linear",
        seed_parameters=4,
        accuracy=40.0,
        accuracy_at_germination=40.0,
        accuracy_at_stage_start=40.0,
        previous_stage=SeedStage.GERMINATED,
        accuracies=(40.0,),
    )


def raised(**growth: Any) -> tuple[SeedSlot, list[tuple[str, float]]]:
    """A slot whose seed has come as far as probation by the shortest way, and that way."""
    slot = empty_slot(**growth)
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0")
    life = []
    for i in range(len(FASTEST_LIFE)):
        epoch(slot, 41.0 + i)
        assert float(slot.alpha) == pytest.approx(slot.state.alpha, abs=1e-7)
        life.append((slot.state.stage.name, round(slot.state.alpha, 4)))
    return slot, life


def test_step_epoch_takes_the_shortest_life_epoch_by_epoch() -> None:
    slot, life = raised()
    assert life == FASTEST_LIFE
    assert slot.state.alpha == 1.0
    assert (slot.state.epochs_alive, slot.state.epochs_in_stage) == (10, 0)
    for i in range(5):
        with pytest.raises(RefusedError, match="G5 refuses"):
            slot.fossilize()
        epoch(slot, 51.0 + i, contribution=1.0)
    assert slot.state.epochs_alive == slot.growth.seed_life() == 15
    assert moves(slot.fossilize()) == [("PROBATIONARY", "FOSSILIZED", "G5 passed")]
    assert slot.state.total_improvement == 55.0 - 40.0


def test_step_epoch_blends_by_the_schedule_the_seed_was_germinated_with() -> None:
    slot = empty_slot(window=2, training_min_epochs=2, blending_epochs=4)
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0", "linear")
    alphas = []
    for i in range(6):
        epoch(slot, 41.0 + i)
        alphas.append(slot.state.alpha)
    assert alphas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert slot.state.stage is SeedStage.PROBATIONARY


def test_step_epoch_keeps_blending_at_full_alpha_until_its_gate_passes() -> None:
    slot = empty_slot(window=2, training_min_epochs=2, blending_epochs=1, probation_min_epochs=3)
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0")
    life = []
    for i in range(5):
        epoch(slot, 41.0 + i)
        life.append((slot.state.stage.name, slot.state.alpha))
    assert life == [
        ("TRAINING", 0.0),
        ("BLENDING", 1.0),
        ("BLENDING", 1.0),
        ("BLENDING", 1.0),
        ("PROBATIONARY", 1.0),
    ]


def test_step_epoch_culls_a_seed_that_never_reaches_blending() -> None:
    slot = empty_slot()
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0")
    for i in range(14):
        assert epoch(slot, 40.0, potential=(-1.25, -0.25)) == [], f"epoch {i + 1}"
    assert moves(epoch(slot, 40.0, potential=(-1.25, -0.25))) == [
        ("TRAINING", "CULLED", "training_timeout"),
        ("CULLED", "EMBARGOED", "closed for 5 epochs"),
    ]


def test_step_epoch_prefers_the_gate_to_the_timeout() -> None:
    slot = empty_slot(training_timeout=5)
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0")
    last = [epoch(slot, 41.0) for _ in range(5)][-1]
    assert moves(last) == [("TRAINING", "BLENDING", "G2 passed")]


@pytest.mark.parametrize("contribution", [0.25, -1.0, None])
def test_step_epoch_culls_at_the_end_of_probation(contribution: float | None) -> None:
    """A contribution that was not measured is not the same as 0."""
    slot, _ = raised()
    for i in range(slot.growth.probation_timeout - 1):
        assert epoch(slot, 50.0, contribution) == [], f"epoch {i + 1}"
    assert moves(epoch(slot, 50.0, contribution))[0] == (
        "PROBATIONARY",
        "CULLED",
        "probation_timeout",
    )


@pytest.mark.parametrize("length", [0, 1, 5])
def test_step_epoch_opens_the_slot_after_the_embargo(length: int) -> None:
    slot = slot_in(SeedStage.BLENDING, embargo_epochs=length)
    slot.cull("requested")
    for _ in range(length):
        assert slot.step_epoch(patience=3) == []
        with pytest.raises(ValueError, match="EMBARGOED"):
            slot.germinate(AFFINE, "s1")
        observe(slot, 60.0)
    assert moves(slot.step_epoch(patience=3)) == [("EMBARGOED", "DORMANT", "embargo over")]
    slot.germinate(AFFINE, "s1")
    assert slot.state.seed_id == "s1"


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.FOSSILIZED])
def test_step_epoch_leaves_empty_and_fossilized_slots_alone(stage: SeedStage) -> None:
    slot = slot_in(stage)
    for _ in range(40):
        assert epoch(slot, 10.0, contribution=-5.0) == []
    assert slot.state.stage is stage


def test_observe_counts_epochs_and_keeps_the_first_accuracies() -> None:
    slot = empty_slot()
    slot.germinate(AFFINE, "s0")
    for accuracy in (50.0, 48.0, 53.5):
        observe(slot, accuracy, None, 0.25)
    state = slot.state
    assert (state.accuracy, state.accuracy_at_germination, state.accuracy_at_stage_start) == (
        53.5,
        50.0,
        50.0,
    )
    assert (state.improvement, state.total_improvement) == (3.5, 3.5)
    assert (state.epochs_in_stage, state.epochs_alive) == (3, 3)
    assert (state.contribution, state.gradient_ratio) == (None, 0.25)


def test_observe_without_a_measurement_forgets_the_last_one() -> None:
    slot = slot_in(SeedStage.PROBATIONARY, contribution=4.0)
    observe(slot, 60.0)
    assert (slot.state.contribution, slot.state.gradient_ratio) == (None, None)


def test_observe_of_an_empty_slot_counts_no_life() -> None:
    slot = empty_slot()
    observe(slot, 50.0)
    observe(slot, 51.0)
    assert (slot.state.epochs_in_stage, slot.state.epochs_alive) == (2, 0)
    assert (slot.state.accuracy, slot.state.accuracy_at_germination) == (51.0, None)


def test_step_epoch_measures_improvement_anew_in_each_stage() -> None:
    slot = empty_slot()
    observe(slot, 40.0)
    slot.germinate(AFFINE, "s0")
    for accuracy in (42.0, 43.0, 44.0, 46.0, 48.0):
        changes = epoch(slot, accuracy)
    assert moves(changes) == [("TRAINING", "BLENDING", "G2 passed")]
    assert changes[0].before.improvement == 8.0
    assert (slot.state.improvement, slot.state.total_improvement) == (0.0, 8.0)
    observe(slot, 47.0)
    assert (slot.state.improvement, slot.state.total_improvement) == (-1.0, 7.0)


def test_fossilize_does_not_count_a_contribution_measured_while_blending() -> None:
    slot = slot_in(SeedStage.BLENDING, alpha=1.0)
    slot.restore(replace(slot.state, epochs_in_stage=4, alpha_steps=5), AFFINE)
    changes = epoch(slot, 60.0, contribution=8.0)
    assert moves(changes) == [("BLENDING", "PROBATIONARY", "G3 passed")]
    assert changes[0].before.contribution == 8.0
    assert slot.state.contribution is None
    before = snapshot(slot)
    with pytest.raises(
        ValueError, match=r"slot 'mid': G5 refuses: 0 of 5 epochs on probation are over"
    ):
        slot.fossilize()
    assert snapshot(slot) == before


def test_fossilize_keeps_the_contribution_it_was_granted_for() -> None:
    slot = slot_in(SeedStage.PROBATIONARY, contribution=1.0)
    (change,) = slot.fossilize()
    assert change.before.contribution == 1.0
    assert (slot.state.contribution, slot.state.alpha) == (1.0, 1.0)


@pytest.mark.parametrize(("on_fossilize", "trainable"), [("keep", True), ("freeze", False)])
def test_fossilize_keeps_or_freezes_the_seed(on_fossilize: str, trainable: bool) -> None:
    slot = slot_in(SeedStage.PROBATIONARY, contribution=3.0, on_fossilize=on_fossilize)
    seed = slot.seed
    x = features()
    slot.fossilize()
    assert slot.seed is seed
    assert [p.requires_grad for p in slot.parameters()] == [trainable, trainable]
    assert torch.equal(slot(x), 2 * x + 1)


@pytest.mark.parametrize("stage", sorted(LIVE))
def test_cull_empties_the_slot_from_any_live_stage(stage: SeedStage) -> None:
    slot = slot_in(stage, alpha=0.75)
    alive = slot.state
    changes = slot.cull("because")
    assert moves(changes) == [
        (stage.name, "CULLED", "because"),
        ("CULLED", "EMBARGOED", "closed for 5 epochs"),
    ]
    assert changes[0].before == alive
    assert slot.seed is None
    assert list(slot.parameters()) == []
    assert slot.state == SlotState(slot="mid", stage=SeedStage.EMBARGOED, accuracy=60.0)
    assert float(slot.alpha) == 0.0
    assert torch.equal(slot(features()), features())


def test_germinate_counts_only_parameters_that_train() -> None:
    def half_frozen(channels: int) -> nn.Module:
        seed = Affine(channels)
        seed.gain.requires_grad_(False)
        return seed

    slot = empty_slot()
    slot.germinate(Blueprint("half", "cnn", half_frozen), "s0")
    assert slot.state.seed_parameters == 1


def test_a_seed_without_parameters_lives_its_whole_life_without_a_gradient() -> None:
    slot = empty_slot()
    observe(slot, 40.0)
    slot.germinate(NOTHING, "s0")
    assert slot.state.seed_parameters == 0
    life = []
    for i in range(len(FASTEST_LIFE)):
        x = features().requires_grad_()
        y = slot(x)
        torch.testing.assert_close(y, x)
        y.backward(features(1))
        torch.testing.assert_close(x.grad, features(1))
        epoch(slot, 41.0 + i, ratio=None)
        life.append((slot.state.stage.name, round(slot.state.alpha, 4)))
    assert life == FASTEST_LIFE


def test_restore_rebuilds_the_slot_that_was_saved() -> None:
    slot = slot_in(SeedStage.BLENDING, alpha=0.25)
    with torch.no_grad():
        affine(slot).gain.fill_(5.0)
    fresh = empty_slot()
    fresh.restore(slot.state, AFFINE)
    fresh.load_state_dict(slot.state_dict())
    assert snapshot(fresh)[0] == slot.state
    assert float(fresh.alpha) == 0.25
    assert torch.equal(fresh(features()), slot(features()))


def on_trial(**growth: Any) -> SeedSlot:
    """A slot that has just begun to blend, after five epochs of 60 %."""
    slot = empty_slot(**growth)
    observe(slot, 60.0)
    slot.germinate(AFFINE, "s0", "linear")
    for _ in range(5):
        epoch(slot, 60.0)
    assert slot.state.stage is SeedStage.BLENDING
    assert slot.state.accuracy_before == 60.0
    return slot


def test_alpha_waits_while_blending_costs_too_much_accuracy() -> None:
    slot = on_trial(blending_cost=1.0)
    alphas = []
    for accuracy in (59.0, 58.75, 58.0, 59.5, 60.0, 60.0, 60.0):
        epoch(slot, accuracy)
        alphas.append((slot.state.stage.name[0], slot.state.alpha))
    waiting = [("B", 0.4), ("B", 0.4), ("B", 0.4)]
    assert alphas == [*waiting, ("B", pytest.approx(0.6)), ("B", 0.8), ("B", 1.0), ("P", 1.0)]


def test_a_seed_that_always_waits_is_culled() -> None:
    slot = on_trial(blending_timeout=4)
    changes = [epoch(slot, 58.5) for _ in range(4)]
    assert changes[:3] == [[], [], []]
    assert moves(changes[3])[0] == ("BLENDING", "CULLED", "blending_timeout")


def test_harm_for_some_epochs_in_a_row_culls_a_seed_on_trial() -> None:
    slot = on_trial(harm=3.0)
    for accuracy in (56.75, 57.0, 56.75):
        assert epoch(slot, accuracy, patience=2) == []
    reason = "accuracy was 3 points below its mean before blending for 2 epochs"
    assert moves(epoch(slot, 50.0, patience=2))[0] == ("BLENDING", "CULLED", reason)


def test_a_seed_waits_in_training_while_another_is_on_trial() -> None:
    slot = empty_slot()
    slot.germinate(AFFINE, "s0")
    changes = [epoch(slot, 60.0, may_blend=False) for _ in range(20)]
    assert not any(changes)
    assert moves(epoch(slot, 60.0))[0] == ("TRAINING", "BLENDING", "G2 passed")


@pytest.mark.parametrize("last", [(-10.0, -0.25), (1.0, 1.5), (1.0, float("nan"))])
def test_one_epoch_of_the_window_can_decide_the_potential(last: tuple[float, float]) -> None:
    """Means over five: (4 - 10) / 5 is below -1, (-1 + 1.5) / 5 is above .05, and NaN passes
    nothing."""
    slot = empty_slot()
    slot.germinate(AFFINE, "s0")
    for potential in [HELPS] * 4 + [last]:
        assert epoch(slot, 60.0, potential=potential) == []
    for _ in range(4):
        assert epoch(slot, 60.0) == []
    assert moves(epoch(slot, 60.0))[0] == ("TRAINING", "BLENDING", "G2 passed")
