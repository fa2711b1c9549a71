"""Blueprints: the small modules that a seed can be made of, by the host's topology.

A module made from a blueprint starts as the identity, so that adding a seed changes nothing, and is
able to learn: some parameter has a non-zero gradient. Both are checked when it is registered, and
again for the channels of each slot when a run is built.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper_train.base.device import plain_defaults
from esper_train.base.names import require_known, require_type

Topology = Literal["cnn", "transformer", "features"]
PROBE_CHANNELS = 8
LORA_RANK = 8
FEATURES: Mapping[str, tuple[str, int]] = {
    "cnn": ("[N, C, H, W]", 1),
    "transformer": ("[N, T, C]", 2),
    "features": ("[N, C]", 1),
}
"""The shape of the features of each topology, and the dimension of their channels."""
PROBE_SHAPES: Mapping[str, tuple[int, ...]] = {
    "cnn": (2, PROBE_CHANNELS, 4, 4),
    "transformer": (2, 5, PROBE_CHANNELS),
    "features": (2, PROBE_CHANNELS),
}
"""The shape of the random features, by topology, on which a new blueprint is checked."""
FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)
"""The errors that a module may raise on features that it cannot take."""


@dataclass(frozen=True)
class Blueprint:
    """A named recipe: `build(channels)` makes a module whose output has the shape of its input."""

    name: str
    topology: Topology
    build: Callable[[int], nn.Module]


class BlueprintRegistry:
    """The blueprints that a run may use, in order of preference. Each run has its own registry."""

    def __init__(self, blueprints: Iterable[Blueprint] = ()) -> None:
        require_type(blueprints, Iterable, "blueprints", "pass [blueprint]")
        self._blueprints: dict[tuple[str, str], Blueprint] = {}
        for blueprint in blueprints:
            self.register(blueprint)

    def register(self, blueprint: Blueprint) -> None:
        """Add a blueprint; `ValueError` if its name is taken, it fails, it is not the identity, or
        it cannot learn."""
        require_type(blueprint, Blueprint, "blueprint")
        require_known("topology", blueprint.topology, PROBE_SHAPES)
        key = (blueprint.topology, blueprint.name)
        if key in self._blueprints:
            raise ValueError(
                f"blueprint {blueprint.name!r} is already registered for {blueprint.topology}"
            )
        _check_birth(blueprint, PROBE_CHANNELS, f"blueprint {blueprint.name!r}")
        self._blueprints[key] = blueprint

    def check(self, topology: str, slot: str, channels: int) -> None:
        """`ValueError` for a blueprint that does not work with the channels of a slot."""
        for name in self.names(topology):
            words = f"blueprint {name!r}, with the {channels} channels of slot {slot!r},"
            _check_birth(self._blueprints[topology, name], channels, words)

    def names(self, topology: str) -> tuple[str, ...]:
        """The names for one topology, in the order of registration."""
        return tuple(name for known, name in self._blueprints if known == topology)

    def require(self, topology: str, name: str) -> Blueprint:
        """The blueprint of this name; `ValueError` lists the names that exist."""
        require_known(f"{topology} blueprint", name, self.names(topology))
        return self._blueprints[topology, name]


def zeroed(layer: nn.Module) -> nn.Module:
    """Set all parameters of the layer to 0, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Residual(nn.Module):
    """x + f(x). The last layer of f starts at zero, so the whole starts as the identity."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        zeroed(layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class GatedNorm(nn.Module):
    """x + g (norm(x) - x) with one learned number g, which starts at 0."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gain = nn.Parameter(torch.zeros(1))  # not [], because FSDP2 divides rows
        self.register_load_state_dict_pre_hook(_with_gain_in_a_row)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.norm(x), self.gain.to(x.dtype))


def _with_gain_in_a_row(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read the gain of version 0.1.0, which had no dimension."""
    name = f"{prefix}gain"
    if name in state:
        state[name] = state[name].reshape(1)


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al., 2018): x * 2 sigmoid(f(mean(x))); the last layer of f
    starts at 0."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction))
        self.excite = zeroed(nn.Linear(self.squeeze.out_features, channels))

    def forward(self, x: Tensor) -> Tensor:
        gate = 2 * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class CausalAttention(nn.Module):
    """Causal self-attention without the output projection, [N, T, C] to [N, T, C].

    `heads` defaults to the largest of 4, 3, 2, 1 that divides the channels. `ValueError` if it does
    not divide them.
    """

    def __init__(self, channels: int, heads: int | None = None) -> None:
        super().__init__()
        self.heads = next(h for h in (4, 3, 2, 1) if channels % h == 0) if heads is None else heads
        if self.heads < 1 or channels % self.heads:
            raise ValueError(
                f"expected a number of heads that divides the width {channels}, got {heads}"
            )
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups (32, 16, 8, 4 or 2) that leave at least 16 channels each, or
    one group."""
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)
    return nn.GroupNorm(groups, channels)


def convolution(channels: int, *, expand: int = 1, groups: int = 1, last: int = 1) -> nn.Module:
    """Residual branch: a 3x3 convolution to `expand` times the channels, and one with kernel size
    `last` back."""
    hidden = expand * channels
    first = nn.Conv2d(channels, hidden, 3, padding=1, groups=groups, bias=False)
    back = nn.Conv2d(hidden, channels, last, padding=last // 2)
    return Residual(first, group_norm(hidden), nn.ReLU(), back)


def depthwise(channels: int) -> nn.Module:
    """Residual branch: a 3x3 convolution of each channel alone, and a 1x1 convolution."""
    return convolution(channels, groups=channels)


def gated_group_norm(channels: int) -> nn.Module:
    """Blends in group norm, for features [N, C, H, W]."""
    return GatedNorm(group_norm(channels))


def gated_layer_norm(channels: int) -> nn.Module:
    """Blends in layer norm, for features whose last dimension is the channels."""
    return GatedNorm(nn.LayerNorm(channels))


def mlp(channels: int) -> nn.Module:
    """Pre-norm feed-forward branch with four times the width."""
    wide = 4 * channels
    return Residual(
        nn.LayerNorm(channels), nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels)
    )


def attention(channels: int) -> nn.Module:
    """Pre-norm causal self-attention branch."""
    return Residual(
        nn.LayerNorm(channels), CausalAttention(channels), nn.Linear(channels, channels)
    )


def lora(channels: int) -> nn.Module:
    """Low-rank linear branch (Hu et al., 2021)."""
    return Residual(
        nn.Linear(channels, LORA_RANK, bias=False), nn.Linear(LORA_RANK, channels, bias=False)
    )


def bottleneck(channels: int) -> nn.Module:
    """Pre-norm linear branch through a quarter of the width, for features [N, C]."""
    narrow = max(1, channels // 4)
    return Residual(
        nn.LayerNorm(channels), nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels)
    )


def gated(channels: int) -> nn.Module:
    """Pre-norm branch with a gated linear unit (Dauphin et al., 2017), for features [N, C]."""
    return Residual(
        nn.LayerNorm(channels),
        nn.Linear(channels, 2 * channels),
        nn.GLU(),
        nn.Linear(channels, channels),
    )


def default_registry() -> BlueprintRegistry:
    """The blueprints of the package, in the order in which controllers try them."""
    return BlueprintRegistry(
        [
            # The first has the most capacity, which a narrow host needs.
            Blueprint("conv_expand", "cnn", partial(convolution, expand=4)),
            Blueprint("conv_light", "cnn", convolution),
            Blueprint("attention", "cnn", ChannelAttention),
            Blueprint("norm", "cnn", gated_group_norm),
            Blueprint("depthwise", "cnn", depthwise),
            Blueprint("conv_heavy", "cnn", partial(convolution, last=3)),
            Blueprint("mlp", "transformer", mlp),
            Blueprint("attention", "transformer", attention),
            Blueprint("lora", "transformer", lora),
            Blueprint("norm", "transformer", gated_layer_norm),
            Blueprint("bottleneck", "features", bottleneck),
            Blueprint("gated", "features", gated),
            Blueprint("norm", "features", gated_layer_norm),
        ]
    )


def _check_birth(blueprint: Blueprint, channels: int, words: str) -> None:
    """Run it on random features: the output must equal the input, and some gradient must not be
    zero. `words` name it in the errors. No random number outside depends on it."""
    shape = list(PROBE_SHAPES[blueprint.topology])
    shape[FEATURES[blueprint.topology][1]] = channels
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), plain_defaults():
        torch.default_generator.manual_seed(0)  # not those of other devices, which are not restored
        try:
            module, x, outputs = _born(blueprint, channels, shape)
        except FAULTS as error:
            raise ValueError(
                f"{words} fails on features of shape {shape}, that is "
                f"{FEATURES[blueprint.topology][0]}: {type(error).__name__}: {error}"
            ) from error
    for mode, y in outputs.items():
        if (y.shape, y.dtype) != (x.shape, x.dtype) or not torch.equal(y, x):
            raise ValueError(
                f"{words} does not start as the identity: expected its output in {mode} to equal "
                f"its input, {x.dtype} of shape {tuple(x.shape)}, got shape {tuple(y.shape)}, "
                f"{y.dtype}. Zero its last layer and add the input."
            )
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters and not any(p.grad is not None and p.grad.count_nonzero() for p in parameters):
        raise ValueError(
            f"{words} cannot learn: none of its parameters has a non-zero gradient at first, so "
            "training never changes it. Zero only the last layer, and let nothing saturate after "
            "it."
        )


def _born(
    blueprint: Blueprint, channels: int, shape: Sequence[int]
) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A new module after a forward and backward pass, its input, and its outputs in training and in
    evaluation."""
    module = blueprint.build(channels)
    require_type(module, nn.Module, "what it builds")
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise ValueError("a lazy layer has no weights yet; give it its sizes, from the channels")
    x = torch.randn(shape)
    outputs = {"training": module.train()(x)}
    require_type(outputs["training"], Tensor, "its output")
    if outputs["training"].requires_grad:
        outputs["training"].backward(torch.randn_like(outputs["training"]))
    with torch.no_grad():
        outputs["evaluation"] = module.eval()(x)
    require_type(outputs["evaluation"], Tensor, "its output")
    return module, x, outputs
