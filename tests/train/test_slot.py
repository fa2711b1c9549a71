"""A slot: its forward maths by hand, the whole life of a seed, and requests that must be refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from esper_train.config import GrowthConfig
from esper_train.morph.blueprints import Blueprint, default_registry
from esper_train.morph.lifecycle import LIVE, SeedStage, SlotState, StageChange
from esper_train.morph.slot import SeedSlot

MAX_EPOCHS = 20  # a dwell of 2 epochs, so the gate's own 3 count
SEATED = [*sorted(LIVE), SeedStage.FOSSILIZED]
EMPTY = [SeedStage.DORMANT, SeedStage.CULLED, SeedStage.EMBARGOED]
CNN_BLUEPRINTS = default_registry().names("cnn")


class Affine(nn.Module):
    """z = 2 x + 1 at birth: not the identity, so that a seed's part in a sum shows, and exact in floats."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 2.0))
        self.shift = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.gain * x + self.shift


AFFINE = Blueprint("affine", "cnn", Affine)
NOTHING = Blueprint("nothing", "cnn", lambda channels: nn.Identity())


def empty_slot(max_epochs: int = MAX_EPOCHS, **growth: Any) -> SeedSlot:
    return SeedSlot("mid", 3, GrowthConfig(**growth), max_epochs)


def slot_in(stage: SeedStage, *, alpha: float = 1.0, contribution: float | None = None, **growth: Any) -> SeedSlot:
    """A slot in a stage, with an `Affine` seed where the stage has one."""
    slot = empty_slot(**growth)
    if stage in SEATED:
        state = SlotState(
            slot="mid",
            stage=stage,
            seed_id="s0",
            blueprint="affine",
            blend="sigmoid",
            alpha=0.0 if stage <= SeedStage.TRAINING else alpha,
            epochs_in_stage=1,
            epochs_alive=4,
            seed_parameters=4,
            accuracy=60.0,
            accuracy_at_germination=50.0,
            accuracy_at_stage_start=59.0,
            contribution=contribution,
            gradient_ratio=0.5,
        )
        slot.restore(state, AFFINE)
    else:
        slot.restore(SlotState(slot="mid", stage=stage, accuracy=60.0), None)
    return slot


def affine(slot: SeedSlot) -> Affine:
    assert isinstance(slot.seed, Affine)
    return slot.seed


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def snapshot(slot: SeedSlot) -> tuple[Any, ...]:
    """All that a refused request must leave alone."""
    parameters = {name: (p.detach().clone(), p.requires_grad) for name, p in slot.named_parameters()}
    return slot.state, slot.seed, float(slot.alpha), {n: (v.tolist(), g) for n, (v, g) in parameters.items()}


def moves(changes: list[StageChange]) -> list[tuple[str, str, str]]:
    return [(c.before.stage.name, c.stage.name, c.reason) for c in changes]


# the value of a slot and its gradients


@pytest.mark.parametrize("isolate", [True, False])
def test_forward_in_training_leaves_the_value_and_gives_the_seed_the_full_gradient(isolate: bool) -> None:
    """y = x + (z - z) and dL/dz = dL/dy = g, so the gain gets sum(g x) and the shift sum(g)."""
    slot = slot_in(SeedStage.TRAINING, isolate_training=isolate)
    x, g = features(0).requires_grad_(), features(1)
    y = slot(x)
    assert torch.equal(y, x)
    y.backward(g)
    seed = affine(slot)
    assert seed.gain.grad is not None
    assert seed.shift.grad is not None
    by_hand = (g.double() * x.detach().double()).sum((0, 2, 3))
    torch.testing.assert_close(seed.gain.grad.flatten().double(), by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seed.shift.grad.double(), g.double().sum(), rtol=1e-5, atol=1e-6)
    # with isolation the host gets g alone, without it also the gradient through the seed: g + 2 g
    assert torch.equal(x.grad, g if isolate else 3 * g)


@pytest.mark.parametrize("blueprint", CNN_BLUEPRINTS)
def test_forward_in_isolated_training_gives_the_host_the_gradients_of_the_bare_host(blueprint: str) -> None:
    """Bit for bit, and not only at birth: the seed's parameters are moved first."""

    def host() -> tuple[nn.Conv2d, nn.Conv2d]:
        torch.manual_seed(0)
        return nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)

    x = torch.randn(4, 1, 7, 6, generator=torch.Generator().manual_seed(3))
    bare, grown = host(), host()
    bare[1](bare[0](x)).square().sum().backward()
    slot = empty_slot()
    slot.germinate(default_registry().require("cnn", blueprint), "s0")
    with torch.no_grad():
        for p in slot.parameters():
            p.add_(0.1)
    grown[1](slot(grown[0](x))).square().sum().backward()
    for a, b in zip(bare, grown, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
        assert torch.equal(a.bias.grad, b.bias.grad)
    assert any(p.grad is not None and p.grad.count_nonzero() for p in slot.parameters())


def test_forward_in_training_does_not_run_the_seed_when_nothing_is_differentiated() -> None:
    slot = slot_in(SeedStage.TRAINING)
    with torch.no_grad():
        assert torch.equal(slot(features()), features())
    assert affine(slot).calls == 0


@pytest.mark.parametrize("alpha", [0.0, 0.0265969, 0.25, 0.7685, 1.0])
def test_forward_in_blending_is_the_lerp_and_shares_the_gradient(alpha: float) -> None:
    """y = (1 - a) x + a z with z = 2 x + 1: dy/dx = 1 - a + 2 a, dy/dgain = a x, all in float64."""
    slot = slot_in(SeedStage.BLENDING, alpha=alpha)
    x, g = features(0).requires_grad_(), features(1)
    y = slot(x)
    y.backward(g)
    x64, g64 = x.detach().double(), g.double()
    torch.testing.assert_close(y.double(), (1 - alpha) * x64 + alpha * (2 * x64 + 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), (1 + alpha) * g64, rtol=1e-6, atol=1e-6)
    gain = affine(slot).gain.grad
    assert gain is not None
    torch.testing.assert_close(gain.flatten().double(), alpha * (g64 * x64).sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [SeedStage.PROBATIONARY, SeedStage.FOSSILIZED])
def test_forward_on_probation_and_after_is_the_seeds_output(stage: SeedStage) -> None:
    x = features()
    assert torch.equal(slot_in(stage)(x), 2 * x + 1)


@pytest.mark.parametrize("stage", [*EMPTY, SeedStage.GERMINATED])
def test_forward_without_a_working_seed_is_the_identity(stage: SeedStage) -> None:
    slot, x = slot_in(stage), features().requires_grad_()
    y = slot(x)
    assert torch.equal(y, x)
    y.backward(features(1))
    assert torch.equal(x.grad, features(1))


@pytest.mark.parametrize("stage", SEATED)
def test_forward_under_alpha_0_leaves_the_seed_out(stage: SeedStage) -> None:
    slot, x = slot_in(stage, alpha=0.75), features()
    before = snapshot(slot)
    assert torch.equal(slot(x, 0.0), x)
    assert affine(slot).calls == 0
    assert str(snapshot(slot)) == str(before)


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED])
@pytest.mark.parametrize("alpha", [0.125, 0.5, 1.0])
def test_forward_under_another_alpha_holds_for_that_call_only(stage: SeedStage, alpha: float) -> None:
    slot, x = slot_in(stage, alpha=0.75), features()
    own = slot(x).detach().clone()
    before = snapshot(slot)
    expected = (1 - alpha) * x.double() + alpha * (2 * x.double() + 1)
    torch.testing.assert_close(slot(x, alpha).double(), expected, rtol=1e-6, atol=1e-6)
    assert str(snapshot(slot)) == str(before)
    assert torch.equal(slot(x), own)


@pytest.mark.parametrize("stage", SEATED)
def test_forward_keeps_the_dtype_of_its_input(stage: SeedStage) -> None:
    slot = slot_in(stage, alpha=0.5)
    affine(slot).to(torch.bfloat16)
    assert slot(features().bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("blueprint", CNN_BLUEPRINTS)
def test_forward_in_isolated_training_takes_channels_last_features(blueprint: str) -> None:
    """Group norm's backward crashes on a detached channels-last input on the CPU: none must reach the seed.

    The gradients are those for the same features in the default layout.
    """
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        slot = SeedSlot("mid", 16, GrowthConfig(), MAX_EPOCHS)
        slot.germinate(default_registry().require("cnn", blueprint), "s0")
        with torch.no_grad():
            for p in slot.parameters():
                p.add_(0.1)
        x = torch.randn(3, 16, 5, 2, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
        x.requires_grad_()
        y = slot(x)
        assert torch.equal(y, x)
        y.backward(torch.ones_like(x))
        gradients.append([p.grad for p in slot.parameters()])
    for default, last in zip(*gradients, strict=True):
        torch.testing.assert_close(default, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 16, 5, 3), (4, 12, 1, 1), (4, 1, 5, 3)])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("stage", SEATED[1:])
def test_forward_takes_channels_last_features_without_gradient(
    shape: tuple[int, ...], isolate: bool, stage: SeedStage
) -> None:
    """Behind a frozen host, in every stage, also where a 1x1 map's strides leave the layout open: no crash."""
    registry = default_registry()
    slot = SeedSlot("mid", shape[1], GrowthConfig(isolate_training=isolate), MAX_EPOCHS)
    state = SlotState(slot="mid", stage=stage, blueprint="norm", blend="linear", alpha=0.5, accuracy=1.0)
    slot.restore(state, registry.require("cnn", "norm"))
    with torch.no_grad():
        for p in slot.parameters():
            p.add_(0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    slot(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in slot.parameters())


def test_forward_in_training_keeps_its_value_when_the_seed_diverges() -> None:
    slot = slot_in(SeedStage.TRAINING)
    with torch.no_grad():
        affine(slot).shift.fill_(torch.inf)
    x = features().requires_grad_()
    y = slot(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_forward_override_blends_in_training_too() -> None:
    """z = 2 x + 1, so a quarter of it gives 1.25 x + 0.25."""
    x = features()
    torch.testing.assert_close(slot_in(SeedStage.TRAINING)(x, 0.25), 1.25 * x + 0.25)


def test_germinate_makes_a_seed_of_the_slots_dtype() -> None:
    slot = empty_slot().double()
    slot.germinate(AFFINE, "s0")
    assert slot(features().double()).dtype == torch.float64


def test_restore_freezes_a_fossil_where_fossils_are_frozen() -> None:
    frozen, kept = (slot_in(SeedStage.FOSSILIZED, on_fossilize=how) for how in ("freeze", "keep"))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in kept.parameters())


def test_a_long_run_leaves_training_time_beyond_the_dwell() -> None:
    """In 160 epochs the dwell is 16, longer than the timeout of 15: it is waited for twice before a cull."""
    slot = SeedSlot("early", 3, GrowthConfig(), 160)
    slot.observe(10.0)
    slot.germinate(AFFINE, "s0")
    for epoch in range(16):
        assert slot.state.stage is SeedStage.TRAINING
        slot.observe(11.0 + epoch, None, 1.0)
        slot.step_epoch()
    assert slot.state.stage is SeedStage.BLENDING


# the life of a seed


def epoch(
    slot: SeedSlot, accuracy: float, contribution: float | None = None, ratio: float | None = 1.0
) -> list[StageChange]:
    """What a run does with a slot at the end of an epoch."""
    slot.observe(accuracy, contribution, ratio)
    return slot.step_epoch()


def test_germinate_starts_training_at_once() -> None:
    slot = empty_slot()
    slot.observe(40.0)
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
    )
    slot(features().requires_grad_()).sum().backward()
    assert affine(slot).gain.grad is not None


# (stage, alpha) after each epoch; the sigmoid at 1/5, 2/5, 3/5, 4/5 is 0.0266, 0.2315, 0.7685, 0.9734. The first
# of them is there when blending begins: an epoch at alpha 0 would teach the seed nothing.
FASTEST_LIFE = [
    ("TRAINING", 0.0),
    ("TRAINING", 0.0),
    ("BLENDING", 0.0266),
    ("BLENDING", 0.2315),
    ("BLENDING", 0.7685),
    ("BLENDING", 0.9734),
    ("BLENDING", 1.0),
    ("PROBATIONARY", 1.0),
]


def raised(**growth: Any) -> tuple[SeedSlot, list[tuple[str, float]]]:
    """A slot whose seed has come as far as probation by the shortest way, and that way."""
    slot = empty_slot(**growth)
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0")
    course = []
    for i in range(len(FASTEST_LIFE)):
        epoch(slot, 41.0 + i)
        assert float(slot.alpha) == pytest.approx(slot.state.alpha, abs=1e-7)
        course.append((slot.state.stage.name, round(slot.state.alpha, 4)))
    return slot, course


def test_step_epoch_takes_the_shortest_life_epoch_by_epoch() -> None:
    slot, course = raised()
    assert course == FASTEST_LIFE
    assert slot.state.alpha == 1.0
    assert (slot.state.epochs_alive, slot.state.epochs_in_stage) == (8, 0)
    # the next epoch measures the first contribution at full alpha: the 9th, as `seed_life` says
    epoch(slot, 49.0, contribution=1.0)
    assert slot.state.epochs_alive == slot.growth.seed_life(MAX_EPOCHS) == 9
    assert moves(slot.fossilize()) == [("PROBATIONARY", "FOSSILIZED", "G5 passed")]
    assert slot.state.total_improvement == 49.0 - 40.0


def test_step_epoch_blends_by_the_schedule_the_seed_was_germinated_with() -> None:
    slot = empty_slot(blending_min_epochs=2, blending_epochs=4)
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0", "linear")
    alphas = []
    for i in range(6):
        epoch(slot, 41.0 + i)
        alphas.append(slot.state.alpha)
    assert alphas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert slot.state.stage is SeedStage.PROBATIONARY


def test_step_epoch_keeps_blending_at_full_alpha_until_its_gate_passes() -> None:
    slot = empty_slot(blending_min_epochs=2, blending_epochs=1, probation_min_epochs=3)
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0")
    course = []
    for i in range(5):
        epoch(slot, 41.0 + i)
        course.append((slot.state.stage.name, slot.state.alpha))
    assert course == [
        ("TRAINING", 0.0),
        ("BLENDING", 1.0),
        ("BLENDING", 1.0),
        ("BLENDING", 1.0),
        ("PROBATIONARY", 1.0),
    ]


def test_step_epoch_culls_a_seed_that_never_reaches_blending() -> None:
    slot = empty_slot()
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0")
    for i in range(14):
        assert epoch(slot, 40.0) == [], f"epoch {i + 1}"
    assert moves(epoch(slot, 40.0)) == [
        ("TRAINING", "CULLED", "training_timeout"),
        ("CULLED", "EMBARGOED", "closed for 5 epochs"),
    ]


def test_step_epoch_prefers_the_gate_to_the_timeout() -> None:
    slot = empty_slot(training_timeout=3)
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0")
    last = [epoch(slot, 41.0) for _ in range(3)][-1]
    assert moves(last) == [("TRAINING", "BLENDING", "G2 passed")]


@pytest.mark.parametrize("contribution", [0.0, -0.25])
def test_step_epoch_culls_a_seed_without_positive_contribution(contribution: float) -> None:
    slot, _ = raised()
    assert moves(epoch(slot, 50.0, contribution)) == [
        ("PROBATIONARY", "CULLED", "no_positive_contribution"),
        ("CULLED", "EMBARGOED", "closed for 5 epochs"),
    ]
    assert slot.seed is None
    assert slot.state == SlotState(slot="mid", stage=SeedStage.EMBARGOED, accuracy=50.0)


@pytest.mark.parametrize("contribution", [0.5, None])
def test_step_epoch_culls_at_the_end_of_probation(contribution: float | None) -> None:
    """A tenth of 20 epochs is 2, but probation lasts 5 at least; not measured is not the same as 0."""
    slot, _ = raised()
    for i in range(4):
        assert epoch(slot, 50.0, contribution) == [], f"epoch {i + 1}"
    assert moves(epoch(slot, 50.0, contribution))[0] == ("PROBATIONARY", "CULLED", "probation_timeout")


@pytest.mark.parametrize("length", [0, 1, 5])
def test_step_epoch_opens_the_slot_after_the_embargo(length: int) -> None:
    slot = slot_in(SeedStage.BLENDING, embargo_epochs=length)
    slot.cull("requested")
    for _ in range(length):
        assert slot.step_epoch() == []
        with pytest.raises(ValueError, match="EMBARGOED"):
            slot.germinate(AFFINE, "s1")
        slot.observe(60.0)
    assert moves(slot.step_epoch()) == [("EMBARGOED", "DORMANT", "embargo over")]
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
        slot.observe(accuracy, None, 0.25)
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
    slot.observe(60.0)
    assert (slot.state.contribution, slot.state.gradient_ratio) == (None, None)
    with pytest.raises(ValueError, match="contribution was not measured"):
        slot.fossilize()


def test_observe_of_an_empty_slot_counts_no_life() -> None:
    slot = empty_slot()
    slot.observe(50.0)
    slot.observe(51.0)
    assert (slot.state.epochs_in_stage, slot.state.epochs_alive) == (2, 0)
    assert (slot.state.accuracy, slot.state.accuracy_at_germination) == (51.0, None)


def test_step_epoch_measures_improvement_anew_in_each_stage() -> None:
    slot = empty_slot()
    slot.observe(40.0)
    slot.germinate(AFFINE, "s0")
    for accuracy in (44.0, 46.0, 48.0):
        changes = epoch(slot, accuracy)
    assert moves(changes) == [("TRAINING", "BLENDING", "G2 passed")]
    assert changes[0].before.improvement == 8.0
    assert (slot.state.improvement, slot.state.total_improvement) == (0.0, 8.0)
    slot.observe(47.0)
    assert (slot.state.improvement, slot.state.total_improvement) == (-1.0, 7.0)


def test_fossilize_does_not_count_a_contribution_measured_while_blending() -> None:
    slot = slot_in(SeedStage.BLENDING, alpha=1.0)
    slot.restore(replace(slot.state, epochs_in_stage=4), AFFINE)
    changes = epoch(slot, 60.0, contribution=8.0)
    assert moves(changes) == [("BLENDING", "PROBATIONARY", "G3 passed")]
    assert changes[0].before.contribution == 8.0
    assert slot.state.contribution is None
    before = snapshot(slot)
    with pytest.raises(ValueError, match=r"slot 'mid': G5 refuses: contribution was not measured"):
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
    seed, x = slot.seed, features()
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


# requests that are refused

REQUESTS = {
    "germinate": lambda slot: slot.germinate(AFFINE, "s1"),
    "fossilize": lambda slot: slot.fossilize(),
    "cull": lambda slot: slot.cull("requested"),
}
TARGET = {"germinate": "GERMINATED", "fossilize": "FOSSILIZED", "cull": "CULLED"}
LEGAL = {
    ("germinate", "DORMANT"),
    ("fossilize", "PROBATIONARY"),
    ("cull", "GERMINATED"),
    ("cull", "TRAINING"),
    ("cull", "BLENDING"),
    ("cull", "PROBATIONARY"),
}


@pytest.mark.parametrize(
    ("request_name", "stage"),
    [(name, stage) for name in REQUESTS for stage in SeedStage if (name, stage.name) not in LEGAL],
)
def test_requests_out_of_their_stage_are_refused_and_change_nothing(request_name: str, stage: SeedStage) -> None:
    slot = slot_in(stage, alpha=0.75, contribution=9.0)
    before = snapshot(slot)
    message = rf"slot 'mid' cannot go from {stage.name} to {TARGET[request_name]}; legal: "
    with pytest.raises(ValueError, match=message):
        REQUESTS[request_name](slot)
    assert snapshot(slot) == before


@pytest.mark.parametrize(
    ("contribution", "reason"),
    [(None, "contribution was not measured"), (0.75, r"contribution 0\.75 is below 1")],
)
def test_fossilize_is_refused_by_its_gate_and_changes_nothing(contribution: float | None, reason: str) -> None:
    slot = slot_in(SeedStage.PROBATIONARY, contribution=contribution, on_fossilize="freeze")
    before = snapshot(slot)
    with pytest.raises(ValueError, match=rf"slot 'mid': G5 refuses: {reason}"):
        slot.fossilize()
    assert snapshot(slot) == before


def test_germinate_refuses_an_unknown_blend_and_changes_nothing() -> None:
    slot = slot_in(SeedStage.DORMANT)
    before = snapshot(slot)
    with pytest.raises(ValueError, match=r"unknown blend 'liner'; perhaps 'linear'"):
        slot.germinate(AFFINE, "s0", "liner")
    assert snapshot(slot) == before


def test_germinate_changes_nothing_when_the_blueprint_cannot_be_built() -> None:
    def broken(channels: int) -> nn.Module:
        raise ValueError(f"no seed for {channels} channels")

    slot = slot_in(SeedStage.DORMANT)
    before = snapshot(slot)
    with pytest.raises(ValueError, match="no seed for 3 channels"):
        slot.germinate(Blueprint("broken", "cnn", broken), "s0")
    assert snapshot(slot) == before


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
    slot.observe(40.0)
    slot.germinate(NOTHING, "s0")
    assert slot.state.seed_parameters == 0
    course = []
    for i in range(len(FASTEST_LIFE)):
        x = features().requires_grad_()
        y = slot(x)
        torch.testing.assert_close(y, x)
        y.backward(features(1))
        torch.testing.assert_close(x.grad, features(1))
        epoch(slot, 41.0 + i, ratio=None)
        course.append((slot.state.stage.name, round(slot.state.alpha, 4)))
    assert course == FASTEST_LIFE


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


# any order of requests

EDGES = {
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


class SlotMachine(RuleBasedStateMachine):
    """Random requests, legal and not, on one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.slot = empty_slot(
            training_timeout=4,
            blending_min_epochs=1,
            blending_epochs=2,
            probation_min_epochs=1,
            embargo_epochs=2,
        )
        self.accuracy = 40.0
        self.seeds = 0

    def request(self, name: str, make: Any) -> None:
        """Ask for something; it is granted along legal edges, or refused and changes nothing."""
        before, stage = snapshot(self.slot), self.slot.state.stage.name
        try:
            changes = make()
        except ValueError:
            granted = (name, stage) in LEGAL and name != "fossilize"
            assert not granted, f"{name} was refused in {stage}"
            assert snapshot(self.slot) == before
            return
        assert (name, stage) in LEGAL
        self.follow(changes, stage)

    def follow(self, changes: list[StageChange], stage: str) -> None:
        for change in changes:
            assert change.before.stage.name == stage
            assert (stage, change.stage.name) in EDGES
            assert change.reason
            stage = change.stage.name
        assert self.slot.state.stage.name == stage

    @rule(blueprint=st.sampled_from([AFFINE, NOTHING]), blend=st.sampled_from(["linear", "sigmoid", "cubic"]))
    def germinate(self, blueprint: Blueprint, blend: str) -> None:
        self.seeds += 1
        if blend == "cubic":
            before = snapshot(self.slot)
            with pytest.raises(ValueError, match=r"unknown blend|cannot go from"):
                self.slot.germinate(blueprint, f"s{self.seeds}", blend)
            assert snapshot(self.slot) == before
        else:
            self.request("germinate", lambda: self.slot.germinate(blueprint, f"s{self.seeds}", blend))

    @rule()
    def cull(self) -> None:
        self.request("cull", lambda: self.slot.cull("requested"))

    @rule()
    def fossilize(self) -> None:
        self.request("fossilize", self.slot.fossilize)

    @rule(
        rise=st.sampled_from([-3.0, 0.0, 1.0]),
        contribution=st.sampled_from([None, -1.0, 0.0, 0.5, 1.0, 5.0]),
        ratio=st.sampled_from([None, 0.01, 1.0]),
    )
    def epoch(self, rise: float, contribution: float | None, ratio: float | None) -> None:
        self.accuracy += rise
        self.slot.observe(self.accuracy, contribution, ratio)
        assert self.slot.state.accuracy == self.accuracy
        stage = self.slot.state.stage.name
        changes = self.slot.step_epoch()
        assert "FOSSILIZED" not in [c.stage.name for c in changes], "only a controller fossilizes"
        self.follow(changes, stage)

    @rule(epochs=st.integers(1, 4))
    def good_epochs(self, epochs: int) -> None:
        for _ in range(epochs):
            self.epoch(1.0, 5.0, 1.0)

    @precondition(lambda self: self.slot.live)
    @rule()
    def good_life(self) -> None:
        """To the end: 2 epochs in TRAINING and 2 in BLENDING at most, then a contribution."""
        for _ in range(4):
            if self.slot.state.stage is not SeedStage.PROBATIONARY:
                self.epoch(10.0, 5.0, 1.0)
        assert self.slot.state.stage is SeedStage.PROBATIONARY
        self.epoch(10.0, 5.0, 1.0)
        if self.slot.state.stage is SeedStage.PROBATIONARY:  # else its time was over
            self.request("fossilize", self.slot.fossilize)
            assert self.slot.state.stage is SeedStage.FOSSILIZED

    @precondition(lambda self: self.slot.seed is not None)
    @rule(alpha=st.sampled_from([None, 0.0, 0.5, 1.0]))
    def forward(self, alpha: float | None) -> None:
        before = snapshot(self.slot)
        y = self.slot(features(), alpha)
        assert y.shape == features().shape
        assert bool(y.isfinite().all())
        assert snapshot(self.slot) == before

    @invariant()
    def a_seed_is_seated_exactly_where_a_blueprint_is_recorded(self) -> None:
        state = self.slot.state
        assert (self.slot.seed is not None) == (state.blueprint is not None) == (state.seed_id is not None)
        assert (self.slot.seed is not None) == (state.stage in SEATED)
        assert self.slot.live == (state.stage in LIVE)

    @invariant()
    def alpha_is_the_states_and_0_without_a_working_seed(self) -> None:
        state = self.slot.state
        assert float(self.slot.alpha) == pytest.approx(state.alpha, abs=1e-7)
        assert 0.0 <= state.alpha <= 1.0
        if state.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
            assert state.alpha == 1.0
        elif state.stage is not SeedStage.BLENDING:
            assert state.alpha == 0.0


SlotMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestSlotMachine = SlotMachine.TestCase
