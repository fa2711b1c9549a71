"""Blueprints: the small modules a seed can be, by topology of the host.

Every blueprint is the identity at birth, so that seating a seed changes nothing, and alive at birth: some
parameter has a non-zero gradient, so that it can learn. Both are checked when it is registered.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from esper_train.base.device import plain_defaults
from esper_train.base.names import require_known

Topology = Literal["cnn", "transformer"]
PROBE_CHANNELS = 8
LORA_RANK = 8
# a feature map [N, C, H, W] or a sequence [N, T, C] of random numbers stands for a host's features
PROBE_SHAPES = {"cnn": (2, PROBE_CHANNELS, 4, 4), "transformer": (2, 5, PROBE_CHANNELS)}


@dataclass(frozen=True)
class Blueprint:
    """A named recipe: `build(channels)` makes a module that maps features to features of the same shape."""

    name: str
    topology: Topology
    build: Callable[[int], nn.Module]


class BlueprintRegistry:
    """The blueprints a run may use, in order of preference. Owned by the run."""

    def __init__(self, blueprints: Iterable[Blueprint] = ()) -> None:
        self._blueprints: dict[tuple[str, str], Blueprint] = {}
        for blueprint in blueprints:
            self.register(blueprint)

    def register(self, blueprint: Blueprint) -> None:
        """Add a blueprint; `ValueError` if its name is taken, or if it is not an identity or not alive at birth."""
        require_known("topology", blueprint.topology, PROBE_SHAPES)
        key = (blueprint.topology, blueprint.name)
        if key in self._blueprints:
            raise ValueError(f"blueprint {blueprint.name!r} is already registered for {blueprint.topology}")
        _check_birth(blueprint)
        self._blueprints[key] = blueprint

    def names(self, topology: str) -> tuple[str, ...]:
        """Names for one topology, in the order of registration."""
        return tuple(name for known, name in self._blueprints if known == topology)

    def require(self, topology: str, name: str) -> Blueprint:
        """Look a blueprint up; `ValueError` names those that exist."""
        require_known(f"{topology} blueprint", name, self.names(topology))
        return self._blueprints[topology, name]


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer itself, all of its parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Residual(nn.Module):
    """x + f(x), the identity as long as the last layer of f is zero."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        zeroed(layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class GatedNorm(nn.Module):
    """x + g (norm(x) - x) with one learned g, 0 at birth."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.norm(x), self.gain.to(x.dtype))


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al., 2018), x * 2 sigmoid(f(mean(x))) with the last layer of f 0 at birth."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction))
        self.excite = zeroed(nn.Linear(self.squeeze.out_features, channels))

    def forward(self, x: Tensor) -> Tensor:
        gate = 2 * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class CausalAttention(nn.Module):
    """What each position gathers from itself and those before it, all heads side by side: [N, T, C] to [N, T, C].

    Without the output projection. `heads` is 4, or the largest divisor of the channels below; `ValueError` if it
    does not divide them.
    """

    def __init__(self, channels: int, heads: int | None = None) -> None:
        super().__init__()
        self.heads = next(h for h in (4, 3, 2, 1) if channels % h == 0) if heads is None else heads
        if self.heads < 1 or channels % self.heads:
            raise ValueError(f"expected a number of heads that divides the width {channels}, got {heads}")
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups (32 at most) that leave each at least 16 channels; else one group."""
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)
    return nn.GroupNorm(groups, channels)


def convolution(channels: int, *, expand: int = 1, groups: int = 1, last: int = 1) -> nn.Module:
    """3x3 convolution to `expand` times the channels, and back by one with a kernel of size `last`."""
    hidden = expand * channels
    first = nn.Conv2d(channels, hidden, 3, padding=1, groups=groups, bias=False)
    back = nn.Conv2d(hidden, channels, last, padding=last // 2)
    return Residual(first, group_norm(hidden), nn.ReLU(), back)


def mlp(channels: int) -> nn.Module:
    """Pre-norm position-wise network with four times the width."""
    wide = 4 * channels
    return Residual(nn.LayerNorm(channels), nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels))


def attention(channels: int) -> nn.Module:
    """Pre-norm causal self-attention."""
    return Residual(nn.LayerNorm(channels), CausalAttention(channels), nn.Linear(channels, channels))


def lora(channels: int) -> nn.Module:
    """Linear map of low rank (Hu et al., 2021)."""
    return Residual(nn.Linear(channels, LORA_RANK, bias=False), nn.Linear(LORA_RANK, channels, bias=False))


def default_registry() -> BlueprintRegistry:
    """The blueprints that come with the package, in the order to try them."""
    return BlueprintRegistry(
        [
            Blueprint("conv_expand", "cnn", partial(convolution, expand=4)),  # the most capacity for a narrow host
            Blueprint("conv_light", "cnn", convolution),
            Blueprint("attention", "cnn", ChannelAttention),
            Blueprint("norm", "cnn", lambda channels: GatedNorm(group_norm(channels))),
            Blueprint("depthwise", "cnn", lambda channels: convolution(channels, groups=channels)),
            Blueprint("conv_heavy", "cnn", partial(convolution, last=3)),
            Blueprint("mlp", "transformer", mlp),
            Blueprint("attention", "transformer", attention),
            Blueprint("lora", "transformer", lora),
            Blueprint("norm", "transformer", lambda channels: GatedNorm(nn.LayerNorm(channels))),
        ]
    )


def _check_birth(blueprint: Blueprint) -> None:
    """Build once on random features: the output must equal the input, and some parameter must have a gradient."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), plain_defaults():
        torch.manual_seed(0)
        module = blueprint.build(PROBE_CHANNELS)
        x = torch.randn(PROBE_SHAPES[blueprint.topology])
        y = module(x)
        if y.shape != x.shape or not torch.equal(y, x):
            raise ValueError(
                f"blueprint {blueprint.name!r} is not the identity at birth: expected its output to equal its "
                f"input of shape {tuple(x.shape)}, got shape {tuple(y.shape)}. Zero its last layer and add the input."
            )
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            return
        if y.requires_grad:
            y.backward(torch.randn_like(y))
        if not any(p.grad is not None and p.grad.count_nonzero() for p in parameters):
            raise ValueError(
                f"blueprint {blueprint.name!r} is dead at birth: none of its parameters has a non-zero gradient, "
                "so it can never learn. Zero only the last layer, with nothing that saturates behind it."
            )
