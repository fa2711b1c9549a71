"""Blueprints start as the identity and can learn; anything else is refused.

Long file: one blueprint after the other.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_train.morph.blueprints import (
    PROBE_SHAPES,
    Blueprint,
    BlueprintRegistry,
    CausalAttention,
    Residual,
    default_registry,
    group_norm,
)

DEFAULTS = [
    ("cnn", "conv_expand"),
    ("cnn", "conv_light"),
    ("cnn", "attention"),
    ("cnn", "norm"),
    ("cnn", "depthwise"),
    ("cnn", "conv_heavy"),
    ("transformer", "mlp"),
    ("transformer", "attention"),
    ("transformer", "lora"),
    ("transformer", "norm"),
]


def built(topology: str, name: str, channels: int) -> nn.Module:
    torch.manual_seed(channels)
    return default_registry().require(topology, name).build(channels)


def features(topology: str, channels: int, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W], or the same positions as a sequence [N, H * W, C]."""
    x = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1))
    return x if topology == "cnn" else x.flatten(2).transpose(1, 2)


def test_default_registry_lists_the_blueprints_in_order_of_preference() -> None:
    registry = default_registry()
    assert registry.names("cnn") == (
        "conv_expand",
        "conv_light",
        "attention",
        "norm",
        "depthwise",
        "conv_heavy",
    )
    assert registry.names("transformer") == ("mlp", "attention", "lora", "norm")
    assert registry.names("graph") == ()


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 48])
@pytest.mark.parametrize(("topology", "name"), DEFAULTS)
def test_default_blueprints_are_the_identity_and_alive_at_birth(
    topology: str, name: str, channels: int, size: tuple[int, int]
) -> None:
    """The output is the input exactly, every gradient is finite, and one step of SGD moves the
    output."""
    module = built(topology, name, channels)
    x = features(topology, channels, size)
    y = module(x)
    assert torch.equal(y, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    gradients = [p.grad for p in module.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    moved = module(x)
    assert not torch.equal(moved, x)
    assert bool(moved.isfinite().all())


@pytest.mark.parametrize(
    ("topology", "name", "parameters"),
    [
        ("cnn", "conv_expand", 8 * 32 * 9 + 2 * 32 + 32 * 8 + 8),
        ("cnn", "conv_light", 8 * 8 * 9 + 2 * 8 + 8 * 8 + 8),
        ("cnn", "attention", (8 * 2 + 2) + (2 * 8 + 8)),
        ("cnn", "norm", 2 * 8 + 1),
        ("cnn", "depthwise", 8 * 9 + 2 * 8 + 8 * 8 + 8),
        ("cnn", "conv_heavy", 8 * 8 * 9 + 2 * 8 + 8 * 8 * 9 + 8),
        ("transformer", "mlp", 2 * 8 + (8 * 32 + 32) + (32 * 8 + 8)),
        ("transformer", "attention", 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8)),
        ("transformer", "lora", 8 * 8 + 8 * 8),
        ("transformer", "norm", 2 * 8 + 1),
    ],
)
def test_default_blueprints_have_the_parameters_counted_by_hand(
    topology: str, name: str, parameters: int
) -> None:
    assert sum(p.numel() for p in built(topology, name, 8).parameters()) == parameters


def test_default_blueprints_equal_their_formulas_once_trained() -> None:
    """The formulas are written out in torch's own functions, with every parameter moved off its
    first value."""
    x = features("cnn", 8, (3, 5))

    def trained(topology: str, name: str) -> list[Tensor]:
        modules[topology, name] = built(topology, name, 8)
        with torch.no_grad():
            for p in modules[topology, name].parameters():
                p.add_(
                    0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                )
        return [p.detach() for p in modules[topology, name].parameters()]

    modules: dict[tuple[str, str], nn.Module] = {}
    f = nn.functional

    conv, gain, shift, out, bias = trained("cnn", "conv_light")
    hidden = f.relu(f.group_norm(f.conv2d(x, conv, padding=1), 1, gain, shift))
    torch.testing.assert_close(modules["cnn", "conv_light"](x), x + f.conv2d(hidden, out, bias))

    w1, b1, w2, b2 = trained("cnn", "attention")
    gate = 2 * torch.sigmoid(f.linear(f.relu(f.linear(x.flatten(2).mean(2), w1, b1)), w2, b2))
    torch.testing.assert_close(
        modules["cnn", "attention"](x), torch.einsum("nchw,nc->nchw", x, gate)
    )

    named = dict(zip(("gain", "weight", "bias"), trained("cnn", "norm"), strict=True))
    norm = f.group_norm(x, 1, named["weight"], named["bias"])
    torch.testing.assert_close(modules["cnn", "norm"](x), x + named["gain"] * (norm - x))

    conv, gain, shift, out, bias = trained("cnn", "depthwise")
    hidden = f.relu(f.group_norm(f.conv2d(x, conv, padding=1, groups=8), 1, gain, shift))
    torch.testing.assert_close(modules["cnn", "depthwise"](x), x + f.conv2d(hidden, out, bias))

    conv, gain, shift, out, bias = trained("cnn", "conv_heavy")
    hidden = f.relu(f.group_norm(f.conv2d(x, conv, padding=1), 1, gain, shift))
    torch.testing.assert_close(
        modules["cnn", "conv_heavy"](x), x + f.conv2d(hidden, out, bias, padding=1)
    )

    sequence = features("transformer", 8, (3, 5))
    g, s, w1, b1, w2, b2 = trained("transformer", "mlp")
    inner = f.linear(f.gelu(f.linear(f.layer_norm(sequence, (8,), g, s), w1, b1)), w2, b2)
    torch.testing.assert_close(modules["transformer", "mlp"](sequence), sequence + inner)

    g, s, qkv, qkv_bias, out, bias = trained("transformer", "attention")
    gathered = attention_by_hand(
        f.linear(f.layer_norm(sequence, (8,), g, s), qkv, qkv_bias), heads=4
    )
    torch.testing.assert_close(
        modules["transformer", "attention"](sequence), sequence + f.linear(gathered, out, bias)
    )

    down, up = trained("transformer", "lora")
    torch.testing.assert_close(
        modules["transformer", "lora"](sequence), sequence + sequence @ down.T @ up.T
    )


def attention_by_hand(qkv: Tensor, heads: int) -> Tensor:
    """Causal attention of [N, T, 3 C], one head and one position after the other; [N, T, C]."""
    channels = qkv.shape[2] // 3
    size = channels // heads
    out = torch.empty(*qkv.shape[:2], channels)
    for head in range(heads):
        q, k, v = (qkv[:, :, i * channels + head * size :][:, :, :size] for i in range(3))
        for t in range(qkv.shape[1]):
            weights = torch.softmax((q[:, t : t + 1] * k[:, : t + 1]).sum(2) / size**0.5, dim=1)
            out[:, t, head * size : (head + 1) * size] = (weights[:, :, None] * v[:, : t + 1]).sum(
                1
            )
    return out


@pytest.mark.parametrize(
    ("channels", "heads"), [(1, 1), (2, 2), (3, 3), (5, 1), (8, 4), (9, 3), (10, 2), (384, 4)]
)
def test_causal_attention_has_4_heads_or_the_largest_divisor_below(
    channels: int, heads: int
) -> None:
    assert CausalAttention(channels).heads == heads


@pytest.mark.parametrize("heads", [3, 0, -2, 16])
def test_causal_attention_refuses_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"number of heads that divides the width 8, got {heads}"):
        CausalAttention(8, heads)


@pytest.mark.parametrize("name", default_registry().names("transformer"))
def test_transformer_blueprints_let_no_position_see_a_later_one(name: str) -> None:
    module = built("transformer", name, 8)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape))
    x = features("transformer", 8, (1, 7))
    later = x.clone()
    later[:, 4:] += 1
    before = module(x)
    after = module(later)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (8, 1), (16, 1), (32, 2), (33, 1), (48, 2), (64, 4), (512, 32), (1024, 32)],
)
def test_group_norm_keeps_16_channels_a_group_at_least(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


class NotIdentity(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class SlightlyOff(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0 + 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Wider(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.cat([x, x], dim=1)


class DeadBranch(nn.Module):
    """x + ReLU(GroupNorm(x)) with the norm's gain 0: the identity, but ReLU passes no gradient at
    0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(x))


class Narrow(NotIdentity):
    """The identity in training; in evaluation one channel, which would be broadcast."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 0 * self.conv(x)
        return y if self.training else y[:, :1]


class Doubles(NotIdentity):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.conv(x).double()


def lazy(channels: int) -> nn.Module:
    return Residual(nn.LazyConv2d(channels, 1), nn.Conv2d(channels, channels, 1))


def function(channels: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x


class InATuple(NotIdentity):
    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (x,)


def pool(channels: int) -> nn.Module:
    return nn.AvgPool2d(2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            NotIdentity,
            r"blueprint 'new' does not start as the identity: .*of shape \(2, 8, 4, 4\), got shape "
            r"\(2, 8",
        ),
        (SlightlyOff, r"blueprint 'new' does not start as the identity"),
        (
            Wider,
            r"does not start as the identity: .*shape \(2, 8, 4, 4\), got shape \(2, 16, 4, 4\)",
        ),
        (pool, r"does not start as the identity: .*shape \(2, 8, 4, 4\), got shape \(2, 8, 2, 2\)"),
        (Narrow, r"output in evaluation to equal .*shape \(2, 8, 4, 4\), got shape \(2, 1, 4, 4\)"),
        (Doubles, r"in training to equal its input, torch.float32 .*, torch.float64\. Zero"),
        (InATuple, r"blueprint 'new' fails on .*its output must be of type Tensor, got \("),
        (lazy, r"blueprint 'new' fails on .*lazy layer .*; give it its sizes"),
        (function, r"blueprint 'new' fails on .*what it builds must be of type Module, got <func"),
        (
            DeadBranch,
            r"blueprint 'new' cannot learn: none of its parameters has a non-zero gradient",
        ),
    ],
)
def test_register_refuses_what_is_not_identity_or_dead_and_stays_as_it_was(
    build: Callable[[int], Any], message: str
) -> None:
    registry = default_registry()
    before = registry.names("cnn")
    with pytest.raises(ValueError, match=message):
        registry.register(Blueprint("new", "cnn", build))
    assert registry.names("cnn") == before
    with pytest.raises(ValueError, match="unknown cnn blueprint 'new'"):
        registry.require("cnn", "new")


def for_eight(channels: int) -> nn.Module:
    return Residual(nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (for_eight, "RuntimeError: .*expected input.* to have 8 channels"),
        (lambda c: Residual(nn.Conv2d(c, c, 1, groups=4)), "ValueError: .*divisible by groups"),
        (lambda c: Residual(nn.Conv2d(c, 8 // (c // 8), 1)), "ZeroDivisionError"),
        (lambda c: {8: nn.Identity()}[c], "KeyError: 6"),
    ],
)
def test_a_blueprint_for_other_channels_than_a_slots_is_named_with_the_slot(
    build: Callable[[int], nn.Module], error: str
) -> None:
    registry = BlueprintRegistry([Blueprint("mine", "cnn", build)])
    registry.check("cnn", "late", 8)
    registry.check("transformer", "late", 6)  # which has none
    words = r"blueprint 'mine', with the 6 channels of slot 'mid', fails on .*\[2, 6, 4, 4\]"
    with pytest.raises(ValueError, match=rf"{words}.*{error}"):
        registry.check("cnn", "mid", 6)


def test_a_blueprint_that_raises_when_it_is_registered_is_named() -> None:
    """The error of a layer's own check does not name the blueprint."""
    recipe = Blueprint("thirds", "cnn", lambda channels: nn.GroupNorm(3, channels))
    with pytest.raises(ValueError, match=r"blueprint 'thirds' fails on .*ValueError: num_channels"):
        BlueprintRegistry([recipe])


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 48])
@pytest.mark.parametrize("topology", list(PROBE_SHAPES))
def test_the_packages_own_pass_the_check_for_any_channels(topology: str, channels: int) -> None:
    default_registry().check(topology, "early", channels)


def test_register_refuses_a_taken_name_and_keeps_the_first() -> None:
    registry = default_registry()
    first = registry.require("cnn", "norm")
    with pytest.raises(ValueError, match=r"blueprint 'norm' is already registered for cnn"):
        registry.register(Blueprint("norm", "cnn", lambda channels: nn.Identity()))
    assert registry.require("cnn", "norm") is first
    assert registry.names("cnn").count("norm") == 1


def test_register_takes_the_same_name_for_another_topology() -> None:
    registry = default_registry()
    registry.register(
        Blueprint("mlp", "cnn", lambda channels: Residual(nn.Conv2d(channels, channels, 1)))
    )
    assert registry.require("cnn", "mlp") is not registry.require("transformer", "mlp")
    assert registry.names("cnn")[-1] == "mlp"
    assert "mlp" in registry.names("transformer")


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_register_takes_a_blueprint_without_parameters(topology: str) -> None:
    registry = BlueprintRegistry([Blueprint("nothing", topology, lambda channels: nn.Identity())])
    assert registry.names(topology) == ("nothing",)


def test_register_works_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        assert default_registry().names("cnn")[0] == "conv_expand"
        with pytest.raises(ValueError, match="cannot learn"):
            BlueprintRegistry([Blueprint("dead", "cnn", DeadBranch)])


@pytest.mark.parametrize("build", [NotIdentity, DeadBranch, lambda c: Residual(nn.Conv2d(c, c, 1))])
def test_register_leaves_torchs_random_state_alone(build: type) -> None:
    """A refusal does too: a run must draw the same numbers whatever was registered before it."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    registry = BlueprintRegistry()
    try:
        registry.register(Blueprint("new", "cnn", build))
        registered = True
    except ValueError:
        registered = False
    assert registered is (build not in (NotIdentity, DeadBranch))
    assert torch.equal(torch.get_rng_state(), before)


def test_register_leaves_the_random_numbers_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    default_registry()
    assert seeded == []


def test_require_names_the_nearest_and_lists_those_of_the_topology_only() -> None:
    with pytest.raises(ValueError, match="unknown cnn blueprint") as caught:
        default_registry().require("cnn", "conv_lite")
    assert str(caught.value) == (
        "unknown cnn blueprint 'conv_lite'; perhaps 'conv_light'? Known: conv_expand, conv_light, "
        "attention, norm, depthwise, conv_heavy"
    )
    with pytest.raises(
        ValueError,
        match=r"unknown transformer blueprint 'conv_light'.* Known: mlp, attention, lora, norm",
    ):
        default_registry().require("transformer", "conv_light")


def test_registries_do_not_share_what_is_registered() -> None:
    mine = default_registry()
    mine.register(Blueprint("nothing", "cnn", lambda channels: nn.Identity()))
    assert "nothing" in mine.names("cnn")
    assert "nothing" not in default_registry().names("cnn")


def test_register_refuses_a_topology_nobody_knows() -> None:
    with pytest.raises(ValueError, match="unknown topology 'rnn'"):
        BlueprintRegistry([Blueprint("x", "rnn", lambda channels: nn.Identity())])  # type: ignore[arg-type]


def test_register_refuses_a_parameter_that_is_never_used() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="cannot learn"):
        BlueprintRegistry([Blueprint("x", "cnn", lambda channels: Unused())])


def test_a_norm_reads_the_gain_of_the_first_version() -> None:
    seed = default_registry().require("features", "norm").build(8)
    seed.load_state_dict({**seed.state_dict(), "gain": torch.tensor(0.5)})
    assert seed.state_dict()["gain"].tolist() == [0.5]
