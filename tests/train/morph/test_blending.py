"""The learned gate: where it starts and ends, that it learns, and that a causal host stays
causal."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from esper_train.morph.blending import Gate
from esper_train.morph.blueprints import default_registry
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage
from esper_train.morph.slot import SeedSlot
from tests.helpers.slots import epoch, observe

MAPS = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def random_gate() -> Gate:
    torch.manual_seed(2)
    gate = Gate(8)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=2.0)
    return gate


@pytest.mark.parametrize("x", [MAPS, TOKENS], ids=["maps", "tokens"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gate_at_birth_leaves_the_schedule_alone(x: torch.Tensor, alpha: float) -> None:
    bent = Gate(8)(x, torch.tensor(alpha))
    assert bent.shape == ((3, 1, 1, 1) if x.dim() == 4 else (3, 5, 1))
    torch.testing.assert_close(bent, torch.full_like(bent, alpha))


@pytest.mark.parametrize("x", [MAPS, TOKENS], ids=["maps", "tokens"])
def test_gate_ends_at_one_and_starts_at_zero_whatever_it_learned(x: torch.Tensor) -> None:
    gate = random_gate()
    assert bool((gate(x, torch.tensor(0.0)) == 0).all())
    assert bool((gate(x, torch.tensor(1.0)) == 1).all())


def test_gate_bends_by_hand() -> None:
    """g = sigmoid(ln 3) = 3/4 at alpha 1/2: 1/2 (1/2 + 2 * 3/4 * 1/2) = 5/8; g = 1/4 gives 3/8."""
    gate = Gate(8)
    last = gate.score[-1]
    assert isinstance(last, nn.Linear)
    for log_odds, expected in ((torch.tensor(3.0).log(), 0.625), (-torch.tensor(3.0).log(), 0.375)):
        with torch.no_grad():
            last.bias.fill_(log_odds)
        torch.testing.assert_close(
            gate(MAPS, torch.tensor(0.5)), torch.full((3, 1, 1, 1), expected)
        )


def test_a_tokens_gate_sees_that_token_alone() -> None:
    gate = random_gate()
    changed = TOKENS.clone()
    changed[:, 3:] += 1.0
    before = gate(TOKENS, torch.tensor(0.5))
    after = gate(changed, torch.tensor(0.5))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])


def gated_slot() -> SeedSlot:
    torch.manual_seed(0)
    slot = SeedSlot("mid", 8, GrowthConfig())
    observe(slot, 50.0)
    slot.germinate(default_registry().require("cnn", "conv_light"), "s0", "gated")
    return slot


def test_gate_is_trained_while_the_seed_is_blended_in() -> None:
    slot = gated_slot()
    slot.restore(
        replace(slot.state, stage=SeedStage.BLENDING, alpha=0.5),
        default_registry().require("cnn", "conv_light"),
    )
    assert slot.gate is not None
    assert slot.seed is not None
    for parameter in slot.seed.parameters():
        nn.init.normal_(parameter)
    slot(MAPS).square().sum().backward()
    last = slot.gate.score[-1]
    assert isinstance(last, nn.Linear)
    assert last.weight.grad is not None
    assert bool(last.weight.grad.abs().sum() > 0)


def test_gate_goes_when_alpha_is_one_and_the_seed_has_the_whole_output() -> None:
    slot = gated_slot()
    for number in range(10):
        epoch(slot, 51.0 + number, contribution=5.0)
        if slot.state.stage is SeedStage.PROBATIONARY:
            break
    assert (slot.state.stage, slot.state.alpha, slot.gate) == (SeedStage.PROBATIONARY, 1.0, None)
    assert slot.seed is not None
    assert torch.equal(slot(MAPS), slot.seed(MAPS))


def test_gate_goes_with_a_culled_seed() -> None:
    slot = gated_slot()
    assert slot.gate is not None
    slot.cull("test")
    assert slot.gate is None
    assert list(slot.parameters()) == []
