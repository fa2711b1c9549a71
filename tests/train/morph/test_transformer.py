"""The transformer host: causal, tied, near ln V at the start, and equal to the same network in
plain torch."""

import math

import pytest
import torch
from torch import Tensor, nn

from esper_train.morph.blueprints import default_registry
from esper_train.morph.host import Host
from esper_train.morph.model import MorphModel
from esper_train.morph.transformer import transformer_host


def small(depth: int = 3, **arguments: int) -> Host:
    torch.manual_seed(0)
    return transformer_host(vocab_size=11, context=7, width=8, depth=depth, **arguments)


def stirred(module: nn.Module) -> nn.Module:
    """The module with every parameter moved well away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return module


def tokens(*shape: int, vocab_size: int = 11) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(2))


def test_no_logit_depends_on_a_later_token() -> None:
    host = stirred(small())
    x = tokens(3, 7)
    before = host(x)
    for t in range(7):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 11
        after = host(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(dim=2).any(), (
            "and every later one depends on it"
        )


@pytest.mark.parametrize("blueprint", default_registry().names("transformer"))
def test_a_model_with_seeds_stays_causal(blueprint: str) -> None:
    model = MorphModel(small(), ("early", "mid", "late"))
    for slot in ("early", "mid", "late"):
        model.germinate_seed(blueprint, slot, slot=slot)
    stirred(model)
    x = tokens(3, 7)
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % 11
    full = dict.fromkeys(("early", "mid", "late"), 1.0)
    before = model(x, alpha=full)
    after = model(changed, alpha=full)
    assert not torch.allclose(before, model(x, alpha=dict.fromkeys(full, 0.0))), (
        "the seeds must have a part in the output"
    )
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    ("depth", "slots"),
    [(1, ["early"]), (2, ["early", "mid"]), (3, ["early", "mid", "late"])],
    ids=str,
)
def test_parameters_are_those_counted_by_hand_each_once(depth: int, slots: list[str]) -> None:
    attention = 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8)
    mlp = 2 * 8 + (8 * 32 + 32) + (32 * 8 + 8)
    host = small(depth)
    assert (
        sum(p.numel() for p in host.parameters())
        == 11 * 8 + 7 * 8 + depth * (attention + mlp) + 2 * 8
    )
    assert len({id(p) for p in host.parameters()}) == len(list(host.parameters()))
    assert host.slot_channels == dict.fromkeys(slots, 8)
    assert host.topology == "transformer"


def test_slots_lie_after_each_third_of_the_depth() -> None:
    """With 7 blocks, early ends after the third, mid after the fifth: found by silencing what
    follows."""
    host = small(7)
    blocks = [m for m in host.modules() if type(m).__name__ == "Block"]
    x = tokens(2, 7)
    first = host.segments["early"][0]
    expected = first(x)
    for block, slot in zip(blocks, [None, None, "early", None, "mid", None, "late"], strict=True):
        expected = block(expected)
        if slot is not None:
            seen = x
            for name, segment in host.segments.items():
                seen = segment(seen)
                if name == slot:
                    break
            torch.testing.assert_close(seen, expected)


def test_the_head_shares_the_weight_of_the_token_embedding_and_both_feed_its_gradient() -> None:
    host = small(1)
    token, position = (m for m in host.modules() if isinstance(m, nn.Embedding))
    head = host.head[1]
    assert head.weight is token.weight
    assert head.bias is None
    assert position.weight.shape == (7, 8)
    host(torch.tensor([[3]])).sum().backward()
    assert token.weight.grad is not None
    # the head touches every token's row alike, the embedding only that of token 3
    rows = token.weight.grad
    torch.testing.assert_close(rows[torch.arange(11) != 3], rows[0].expand(10, 8))
    assert not torch.allclose(rows[3], rows[0])


def test_state_dict_goes_round_and_keeps_the_weights_tied() -> None:
    host = stirred(small())
    other = transformer_host(vocab_size=11, context=7, width=8, depth=3)
    x = tokens(2, 7)
    assert not torch.allclose(other(x), host(x))
    other.load_state_dict(host.state_dict())
    assert torch.equal(other(x), host(x))
    assert other.head[1].weight is other.segments["early"][0].token.weight


@pytest.mark.parametrize("heads", [None, 1, 2, 8])
def test_one_block_equals_the_same_written_out_in_torch(heads: int | None) -> None:
    host = stirred(small(1) if heads is None else small(1, heads=heads))
    values = dict(host.named_parameters())
    names = ["token", "position", "gain1", "shift1", "qkv", "qkv_bias", "out", "out_bias"]
    names += ["gain2", "shift2", "wide", "wide_bias", "narrow", "narrow_bias", "gain3", "shift3"]
    p = dict(zip(names, values.values(), strict=True))
    x = tokens(2, 5)
    f = nn.functional

    h = p["token"][x] + p["position"][:5]
    peer = nn.MultiheadAttention(8, heads or 4, batch_first=True)
    peer.load_state_dict(
        {
            "in_proj_weight": p["qkv"],
            "in_proj_bias": p["qkv_bias"],
            "out_proj.weight": p["out"],
            "out_proj.bias": p["out_bias"],
        }
    )
    normed = f.layer_norm(h, (8,), p["gain1"], p["shift1"])
    hidden = torch.ones(5, 5).triu(1).bool()
    h = h + peer(normed, normed, normed, attn_mask=hidden, need_weights=False)[0]
    normed = f.layer_norm(h, (8,), p["gain2"], p["shift2"])
    h = h + f.linear(
        f.gelu(f.linear(normed, p["wide"], p["wide_bias"])), p["narrow"], p["narrow_bias"]
    )
    logits = f.layer_norm(h, (8,), p["gain3"], p["shift3"]) @ p["token"].T
    torch.testing.assert_close(host(x), logits)


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("vocab_size", [256, 4096])
def test_the_first_loss_is_near_that_of_guessing(vocab_size: int, depth: int) -> None:
    torch.manual_seed(3)
    host = transformer_host(vocab_size=vocab_size, context=64, depth=depth)
    x = tokens(8, 65, vocab_size=vocab_size)
    loss = nn.functional.cross_entropy(host(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.05)


def test_initial_weights_are_those_of_gpt_2() -> None:
    """N(0, 0.02), the 2 * depth projections into the residual stream by 1 / sqrt(2 * depth) less;
    biases 0."""
    torch.manual_seed(4)
    host = transformer_host(vocab_size=256, context=64, width=128, depth=8)
    attention = {"0.branch.1.qkv": 0.02, "0.branch.2": 0.02 / 4}
    mlp = {"1.branch.1": 0.02, "1.branch.3": 0.02 / 4}
    expected = attention | mlp | {"token": 0.02, "position": 0.02}
    for part, std in expected.items():
        weights = [p for name, p in host.named_parameters() if name.endswith(f"{part}.weight")]
        assert len(weights) == (1 if part in ("token", "position") else 8), part
        assert torch.cat([w.flatten() for w in weights]).std().item() == pytest.approx(
            std, rel=0.03
        ), part
    assert not any(p.any() for name, p in host.named_parameters() if name.endswith("bias"))
    gains = [m.weight for m in host.modules() if isinstance(m, nn.LayerNorm)]
    assert len(gains) == 17
    assert all(torch.equal(gain, torch.ones(128)) for gain in gains)


def test_sequences_up_to_the_context_are_taken_and_longer_ones_refused() -> None:
    host = small()
    assert host(tokens(2, 1)).shape == (2, 1, 11)
    assert host(tokens(2, 7)).shape == (2, 7, 11)
    with pytest.raises(ValueError, match=r"at most 7 tokens.*got 8"):
        host(tokens(2, 8))


def test_a_host_without_blocks_or_with_heads_that_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        small(0)
    with pytest.raises(ValueError, match="divides the width 8, got 3"):
        small(heads=3)


def test_dropout_acts_in_training_only() -> None:
    host = transformer_host(vocab_size=11, context=7, width=8, depth=1, dropout=0.5)
    x = tokens(2, 7)
    assert not torch.equal(host(x), host(x))
    host.eval()
    assert torch.equal(host(x), host(x))
    assert sum(m.p == 0.5 for m in host.modules() if isinstance(m, nn.Dropout)) == 3
