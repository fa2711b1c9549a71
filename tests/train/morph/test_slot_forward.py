"""A slot's value and its gradients, by hand, in every stage and layout."""

import pytest
import torch
from torch import nn

from esper_train.morph.blueprints import default_registry
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.morph.slot import SeedSlot
from tests.helpers.slots import EMPTY, SEATED, affine, empty_slot, features, slot_in, snapshot

CNN_BLUEPRINTS = default_registry().names("cnn")


@pytest.mark.parametrize("isolate", [True, False])
def test_forward_in_training_leaves_the_value_and_gives_the_seed_the_full_gradient(
    isolate: bool,
) -> None:
    """y = x + (z - z) and dL/dz = dL/dy = g, so the gain gets sum(g x) and the shift sum(g)."""
    slot = slot_in(SeedStage.TRAINING, isolate_training=isolate, incubation="straight_through")
    x = features(0).requires_grad_()
    g = features(1)
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
def test_forward_in_isolated_training_gives_the_host_the_gradients_of_the_bare_host(
    blueprint: str,
) -> None:
    """They agree bit for bit, and not only at birth: the seed's parameters are moved first."""

    def host() -> tuple[nn.Conv2d, nn.Conv2d]:
        torch.manual_seed(0)
        return nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)

    x = torch.randn(4, 1, 7, 6, generator=torch.Generator().manual_seed(3))
    bare = host()
    grown = host()
    bare[1](bare[0](x)).square().sum().backward()
    slot = empty_slot(incubation="straight_through")
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
    x = features(0).requires_grad_()
    g = features(1)
    y = slot(x)
    y.backward(g)
    x64 = x.detach().double()
    g64 = g.double()
    torch.testing.assert_close(
        y.double(), (1 - alpha) * x64 + alpha * (2 * x64 + 1), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(x.grad.double(), (1 + alpha) * g64, rtol=1e-6, atol=1e-6)
    gain = affine(slot).gain.grad
    assert gain is not None
    torch.testing.assert_close(
        gain.flatten().double(), alpha * (g64 * x64).sum((0, 2, 3)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("stage", [SeedStage.PROBATIONARY, SeedStage.FOSSILIZED])
def test_forward_on_probation_and_after_is_the_seeds_output(stage: SeedStage) -> None:
    x = features()
    assert torch.equal(slot_in(stage)(x), 2 * x + 1)


@pytest.mark.parametrize("stage", [*EMPTY, SeedStage.GERMINATED])
def test_forward_without_a_working_seed_is_the_identity(stage: SeedStage) -> None:
    slot = slot_in(stage)
    x = features().requires_grad_()
    y = slot(x)
    assert torch.equal(y, x)
    y.backward(features(1))
    assert torch.equal(x.grad, features(1))


@pytest.mark.parametrize("stage", SEATED)
def test_forward_under_alpha_0_leaves_the_seed_out(stage: SeedStage) -> None:
    slot = slot_in(stage, alpha=0.75)
    x = features()
    before = snapshot(slot)
    assert torch.equal(slot(x, 0.0), x)
    assert affine(slot).calls == 0
    assert str(snapshot(slot)) == str(before)


@pytest.mark.parametrize(
    "stage", [SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED]
)
@pytest.mark.parametrize("alpha", [0.125, 0.5, 1.0])
def test_forward_under_another_alpha_holds_for_that_call_only(
    stage: SeedStage, alpha: float
) -> None:
    slot = slot_in(stage, alpha=0.75)
    x = features()
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
    """Group norm's backward crashes on a detached channels-last input on the CPU: none must reach
    the seed.

    The gradients are those for the same features in the default layout.
    """
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        slot = SeedSlot("mid", 16, GrowthConfig())
        slot.germinate(default_registry().require("cnn", blueprint), "s0")
        with torch.no_grad():
            for p in slot.parameters():
                p.add_(0.1)
        x = torch.randn(3, 16, 5, 2, generator=torch.Generator().manual_seed(1)).to(
            memory_format=layout
        )
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
    """The host is frozen, and the seed is in any stage. The strides of a 1x1 map leave the layout
    open."""
    registry = default_registry()
    slot = SeedSlot(
        "mid", shape[1], GrowthConfig(isolate_training=isolate, incubation="straight_through")
    )
    state = SlotState(
        slot="mid", stage=stage, blueprint="norm", blend="linear", alpha=0.5, accuracy=1.0
    )
    slot.restore(state, registry.require("cnn", "norm"))
    with torch.no_grad():
        for p in slot.parameters():
            p.add_(0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(
        memory_format=torch.channels_last
    )
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
