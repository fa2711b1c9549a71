"""The life of a seed as data: stages, transitions, gates, the gradient ratio, blending
schedules.

Long file: one table of states after the other.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from esper_kernels import GradHealth, grad_stats
from esper_train.morph.blending import BLENDS, get_blend, linear, sigmoid
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import GATES, GateResult, gradient_ratio, judge, paired_error
from esper_train.morph.lifecycle import LIVE, TRANSITIONS, SeedStage, SlotState

GROWTH = GrowthConfig(
    window=3,
    training_min_epochs=3,
    blending_potential=0.3,
    blending_loss_change=0.0,
    fossilize_contribution=1.0,
)


def test_seed_stage_numbers_are_the_audited_ones() -> None:
    assert {stage.name: stage.value for stage in SeedStage} == {
        "DORMANT": 1,
        "GERMINATED": 2,
        "TRAINING": 3,
        "BLENDING": 4,
        "PROBATIONARY": 6,
        "FOSSILIZED": 7,
        "CULLED": 8,
        "EMBARGOED": 9,
    }


def test_transitions_are_the_legal_edges_and_no_others() -> None:
    edges = {(a.name, b.name) for a, targets in TRANSITIONS.items() for b in targets}
    assert edges == {
        ("DORMANT", "GERMINATED"),
        ("GERMINATED", "TRAINING"),
        ("TRAINING", "BLENDING"),
        ("BLENDING", "PROBATIONARY"),
        ("PROBATIONARY", "FOSSILIZED"),
        ("GERMINATED", "CULLED"),
        ("TRAINING", "CULLED"),
        ("BLENDING", "CULLED"),
        ("PROBATIONARY", "CULLED"),
        ("CULLED", "EMBARGOED"),
        ("EMBARGOED", "DORMANT"),
    }


def test_transitions_cover_every_stage_and_reach_each_from_dormant() -> None:
    assert set(TRANSITIONS) == set(SeedStage)
    reached = {SeedStage.DORMANT}
    for _ in SeedStage:
        reached |= {b for a in reached for b in TRANSITIONS[a]}
    assert reached == set(SeedStage)


def test_transitions_have_no_way_out_of_fossilized_and_one_out_of_every_other_stage() -> None:
    assert [stage.name for stage in SeedStage if not TRANSITIONS[stage]] == ["FOSSILIZED"]


def test_live_stages_are_those_that_can_be_culled() -> None:
    assert {stage for stage in SeedStage if SeedStage.CULLED in TRANSITIONS[stage]} == LIVE


def test_transitions_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[SeedStage.FOSSILIZED] = frozenset({SeedStage.DORMANT})  # type: ignore[index]
    assert TRANSITIONS[SeedStage.FOSSILIZED] == frozenset()


def test_slot_state_improvements_are_differences_of_accuracies() -> None:
    state = SlotState(
        slot="mid", accuracy=61.0, accuracy_at_germination=50.5, accuracy_at_stage_start=62.25
    )
    assert state.improvement == -1.25
    assert state.total_improvement == 10.5


@pytest.mark.parametrize("missing", ["accuracy", "accuracy_at_stage_start"])
def test_slot_state_improvement_without_a_measurement_is_none(missing: str) -> None:
    state = SlotState(slot="mid", accuracy=61.0, accuracy_at_stage_start=60.0)
    assert replace(state, **{missing: None}).improvement is None


@pytest.mark.parametrize("missing", ["accuracy", "accuracy_at_germination"])
def test_slot_state_total_improvement_without_a_measurement_is_none(missing: str) -> None:
    state = SlotState(slot="mid", accuracy=61.0, accuracy_at_germination=60.0)
    assert replace(state, **{missing: None}).total_improvement is None


def ready(**changes: Any) -> SlotState:
    """A slot that passes every gate exactly at the threshold."""
    state = SlotState(
        slot="early",
        seed_id="s",
        blueprint="norm",
        alpha=0.95,
        epochs_in_stage=3,
        seed_parameters=5,
        accuracy=50.5,
        accuracy_at_stage_start=50.0,
        contributions=(0.5, 2.0, 0.5),
        potentials=((0.25, -0.5), (0.35, 0.25), (0.3, 0.0)),
        accuracies=(50.0, 51.0, 49.0),
        accuracy_before=50.5,
        tolerance=0.5,
    )
    return replace(state, **changes)


def verdict(stage: SeedStage, state: SlotState) -> GateResult:
    return judge(stage, state, GROWTH)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (SeedStage.BLENDING, "G2"),
        (SeedStage.PROBATIONARY, "G3"),
        (SeedStage.FOSSILIZED, "G5"),
    ],
)
def test_gates_pass_at_exactly_their_thresholds(stage: SeedStage, name: str) -> None:
    result = verdict(stage, ready())
    assert result == GateResult(gate=name, failures=())
    assert result.passed


def test_gates_stand_where_something_was_measured_only() -> None:
    assert {stage.name for stage in GATES} == {"BLENDING", "PROBATIONARY", "FOSSILIZED"}


@pytest.mark.parametrize(
    ("stage", "changes", "failure"),
    [
        (SeedStage.BLENDING, {"epochs_in_stage": 2}, "epochs in TRAINING 2 is below 3"),
        (SeedStage.BLENDING, {"potentials": ((0.2, -1.0),) * 3}, "potential 0.2 is below 0.3"),
        (SeedStage.BLENDING, {"potentials": ((math.nan, -1.0),) * 3}, "potential nan is below 0.3"),
        (SeedStage.BLENDING, {"potentials": ((1.0, 0.0),) * 3}, "potential loss +0 is not below 0"),
        (
            SeedStage.BLENDING,
            {"potentials": ((1.0, math.nan),) * 3},
            "potential loss +nan is not below 0",
        ),
        (
            SeedStage.BLENDING,
            {"potentials": ((1.0, -1.0),) * 2},
            "potential was measured in 2 of 3 epochs",
        ),
        (SeedStage.PROBATIONARY, {"epochs_in_stage": 2}, "epochs in BLENDING 2 is below 3"),
        (SeedStage.PROBATIONARY, {"alpha": 0.9375}, "alpha 0.9375 is below 0.95"),
        (
            SeedStage.FOSSILIZED,
            {"contributions": (0.5, 1.5, 0.75)},
            "mean contribution 0.9167 is below 1",
        ),
        (SeedStage.FOSSILIZED, {"contributions": (-3.0,) * 3}, "mean contribution -3 is below 1"),
        (
            SeedStage.FOSSILIZED,
            {"contributions": (math.nan,) * 3},
            "mean contribution nan is below 1",
        ),
        (SeedStage.FOSSILIZED, {"contributions": ()}, "mean contribution was not measured"),
        (
            SeedStage.FOSSILIZED,
            {"accuracies": (49.0, 50.0, 50.0)},
            "mean accuracy 49.67 is below 50",
        ),
        (SeedStage.FOSSILIZED, {"accuracies": (90.0, 90.0)}, "2 of 3 epochs on probation are over"),
        (
            SeedStage.FOSSILIZED,
            {"tolerance": None},
            "the accuracy before blending was not measured",
        ),
    ],
)
def test_gates_refuse_below_a_threshold_and_name_what_was_missing(
    stage: SeedStage, changes: dict[str, Any], failure: str
) -> None:
    result = verdict(stage, ready(**changes))
    assert not result.passed
    assert result.failures == (failure,)


@pytest.mark.parametrize("stage", list(GATES))
def test_gates_pass_above_every_threshold(stage: SeedStage) -> None:
    well = ready(
        alpha=1.0,
        epochs_in_stage=40,
        contributions=(12.0,) * 3,
        potentials=((5.0, -1.0),) * 3,
        accuracies=(90.0,) * 3,
    )
    assert verdict(stage, well).passed


def test_blending_gate_lists_every_failure_at_once() -> None:
    state = ready(epochs_in_stage=0, potentials=((0.0, 1.0),) * 3)
    assert verdict(SeedStage.BLENDING, state).failures == (
        "epochs in TRAINING 0 is below 3",
        "potential 0 is below 0.3",
        "potential loss +1 is not below 0",
    )


def test_blending_gate_knows_no_potential_of_a_seed_without_an_effect() -> None:
    growth = replace(GROWTH, incubation="straight_through")
    assert judge(SeedStage.BLENDING, ready(potentials=()), growth).passed
    assert not judge(SeedStage.BLENDING, ready(epochs_in_stage=2), growth).passed


def test_paired_error_is_that_of_mcnemars_test() -> None:
    """9 rows gained and 7 lost of 400: sqrt(16) rows, which are 1 point."""
    assert paired_error(9, 7, 400) == 1.0
    assert paired_error(0, 0, 400) == 0.0


def test_gates_obey_the_config() -> None:
    growth = replace(
        GROWTH,
        blending_potential=0.1,
        blending_loss_change=-0.5,
        probation_alpha=0.5,
        fossilize_contribution=2.5,
        fossilize_errors=0.0,
    )
    assert not judge(SeedStage.BLENDING, ready(potentials=((0.2, -0.5),) * 3), growth).passed
    assert judge(SeedStage.BLENDING, ready(potentials=((0.2, -0.51),) * 3), growth).passed
    assert judge(SeedStage.PROBATIONARY, ready(alpha=0.5), growth).passed
    good = ready(accuracies=(50.5,) * 3)
    assert not judge(SeedStage.FOSSILIZED, replace(good, contributions=(2.49,) * 3), growth).passed
    assert judge(SeedStage.FOSSILIZED, replace(good, contributions=(2.5,) * 3), growth).passed
    assert not judge(SeedStage.FOSSILIZED, ready(contributions=(2.5,) * 3), growth).passed


def health(norm: float, elements: int, groups: dict[str, GradHealth] | None = None) -> GradHealth:
    return GradHealth(
        gradient_norm=norm,
        gradient_health=1.0,
        has_vanishing=False,
        has_exploding=False,
        min_layer_norm=norm,
        max_layer_norm=norm,
        norm_ratio=1.0,
        zero_grad_fraction=0.0,
        nan_count=0,
        inf_count=0,
        tensors=1,
        elements=elements,
        groups=groups or {},
    )


def measured(seed: tuple[float, int] | None, host: tuple[float, int] | None) -> GradHealth:
    """Gradients of a host and of the seed in `mid`, each a norm and a number of elements."""
    groups = {
        name: health(*value) for name, value in (("host", host), ("mid", seed)) if value is not None
    }
    return health(1.0, 1, groups)


def ratio_of(grad: GradHealth | None) -> float | None:
    return gradient_ratio(grad, None if grad is None else grad.groups.get("mid"))


@pytest.mark.parametrize(
    ("seed", "host", "ratio"),
    [
        ((0.5, 100), (1.0, 10_000), 5.0),  # 0.5 / 1.0 * sqrt(10000 / 100) = 0.5 * 10
        ((2.0, 300), (4.0, 75), 0.25),  # 2 / 4 * sqrt(75 / 300) = 0.5 * 0.5
        ((3.0, 7), (1.5, 7), 2.0),  # equal sizes need no correction
        ((3.0, 100), (1.0, 10_000), 10.0),  # 30, capped
        ((0.0, 100), (1.0, 10_000), 0.0),  # a measured 0 is a 0
        ((1e-8, 1), (1e-8, 1), 1.0),  # the smallest host norm that counts
    ],
)
def test_gradient_ratio_compares_norms_as_if_sizes_were_equal(
    seed: tuple[float, int], host: tuple[float, int], ratio: float
) -> None:
    assert ratio_of(measured(seed, host)) == pytest.approx(ratio, rel=1e-15)


@pytest.mark.parametrize(
    "grad",
    [
        None,
        measured(None, (1.0, 10)),
        measured((1.0, 10), None),
        measured((1.0, 10), (0.0, 10)),
        measured((1.0, 10), (9e-9, 10)),
        measured((1.0, 10), (math.nan, 10)),
        measured((math.nan, 10), (1.0, 10)),
        measured((math.inf, 10), (math.inf, 10)),
        measured((0.0, 0), (1.0, 10)),
    ],
    ids=[
        "no statistics",
        "no seed group",
        "no host group",
        "host 0",
        "host below 1e-8",
        "host NaN",
        "seed NaN",
        "inf over inf",
        "seed without elements",
    ],
)
def test_gradient_ratio_without_two_measured_norms_is_none(grad: GradHealth | None) -> None:
    assert ratio_of(grad) is None


def test_gradient_ratio_of_measured_tensors_equals_torch_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(7, 3, generator=generator), torch.randn(5, generator=generator)]
    seed = [torch.randn(3, 1, generator=generator) * 1e-3]
    stats = grad_stats({"host": [*host, None], "mid": seed}).compute()
    norms = [torch.cat([t.flatten().double() for t in group]).norm() for group in (seed, host)]
    expected = float(norms[0] / norms[1]) * math.sqrt((7 * 3 + 5) / 3)
    assert ratio_of(stats) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_over_five_steps_gives_the_audited_alphas() -> None:
    alphas = [round(sigmoid(step / 5), 4) for step in range(6)]
    assert alphas == [0.0025, 0.0266, 0.2315, 0.7685, 0.9734, 0.9975]


def test_sigmoid_equals_torch_in_float64() -> None:
    progress = torch.linspace(0, 1, 23, dtype=torch.float64)
    expected = torch.sigmoid(12 * (progress - 0.5)).tolist()
    assert [sigmoid(p) for p in progress.tolist()] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("progress", "alpha"),
    [(0.0, 0.0), (0.2, 0.2), (0.75, 0.75), (1.0, 1.0), (-0.5, 0.0), (1.5, 1.0)],
)
def test_linear_is_progress_kept_within_0_and_1(progress: float, alpha: float) -> None:
    assert linear(progress) == alpha


@pytest.mark.parametrize("name", list(BLENDS))
def test_blends_rise_from_near_0_to_near_1(name: str) -> None:
    alphas = [get_blend(name)(step / 16) for step in range(17)]
    assert all(low < high for low, high in pairwise(alphas))
    assert 0 <= alphas[0] < 0.01
    assert 0.99 < alphas[-1] <= 1


def test_get_blend_refuses_an_unknown_name_and_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"blend 'sigmod'; perhaps 'sigmoid'\? Known: linear, sigmoid"
    ):
        get_blend("sigmod")


@pytest.mark.parametrize(("seed", "host"), [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_gradient_ratio_of_norms_that_are_not_finite_is_not_measured(
    seed: float, host: float
) -> None:
    """An infinite norm must not count as a lively seed, nor as a ratio of 0."""
    assert ratio_of(measured((seed, 100), (host, 100))) is None
