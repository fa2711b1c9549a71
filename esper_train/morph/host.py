"""Host networks: a chain of segments with a slot after each, then a head."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.base.modes import evaluating
from esper_train.base.names import require_known, require_size, require_type
from esper_train.morph.blueprints import FEATURES, PROBE_SHAPES, Topology

SLOT_NAMES = ("early", "mid", "late")


class Host(nn.Module):
    """A network in segments, with room for a seed after each of them.

    Args:
        topology: "cnn" for features [N, C, H, W], "transformer" for [N, T, C], "features" for
        [N, C]; selects the blueprints.
        segments: by slot name, the module whose output the slot gets, in order of execution. The
        first is called as the whole network is: by the loop, a dict of inputs as keyword arguments.
        head: maps the features of the last segment to logits.
        slot_channels: by slot name, the number of channels C of the features there.
    """

    def __init__(
        self,
        topology: Topology,
        segments: Mapping[str, nn.Module],
        head: nn.Module,
        slot_channels: Mapping[str, int],
    ) -> None:
        super().__init__()
        require_type(segments, Mapping, "segments", "pass modules by slot name")
        require_type(slot_channels, Mapping, "slot_channels", "pass numbers by slot name")
        if set(segments) != set(slot_channels):
            raise ValueError(
                f"expected channels for each segment {list(segments)}, got them for "
                f"{list(slot_channels)}"
            )
        self.topology = topology
        self.segments = nn.ModuleDict(segments)
        self.head = head
        self.slot_channels = dict(slot_channels)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Everything given, named or not, goes to the first segment; the head's output comes
        back."""
        first, *others = self.segments.values()
        x = first(*inputs, **named)
        for segment in others:
            x = segment(x)
        return self.head(x)

    @property
    def output_layer(self) -> nn.Linear | None:
        """The last layer of the head, where that is linear."""
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        return last if isinstance(last, nn.Linear) else None

    def before_output(self, x: Tensor) -> Tensor:
        """The input of the head's last layer, for the features of the last segment."""
        if isinstance(self.head, nn.Sequential):
            for layer in list(self.head)[:-1]:
                x = layer(x)
        return x


def check_host(host: Host, *inputs: Any, **named: Any) -> Any:
    """Send a batch through every segment, in evaluation mode, and return the output of the head.

    Raises `ValueError` where the features are not those that the host's topology and
    `slot_channels` promise, or where a segment fails.
    """
    require_known("topology", host.topology, FEATURES)
    shape, dim = FEATURES[host.topology]
    with evaluating(host), torch.no_grad():
        for name, segment in host.segments.items():
            x = _through(segment, f"segment {name!r}", *inputs, **named)
            if not isinstance(x, Tensor) or x.dim() != len(PROBE_SHAPES[host.topology]):
                raise ValueError(
                    f"topology {host.topology!r} has features {shape}, but segment {name!r} "
                    f"gives {_described(x)}; choose another topology, or cut the host elsewhere"
                )
            if x.shape[dim] != host.slot_channels[name]:
                raise ValueError(
                    f"slot_channels says {host.slot_channels[name]} channels for segment "
                    f"{name!r}, but it gives {x.shape[dim]}: features {list(x.shape)}, that is "
                    f"{shape}; correct slot_channels"
                )
            inputs, named = (x,), {}
        return _through(host.head, "the head", *inputs)


def _through(module: nn.Module, words: str, *inputs: Any, **named: Any) -> Any:
    try:
        return module(*inputs, **named)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        given = [*map(_described, inputs), *(f"{k}: {_described(x)}" for k, x in named.items())]
        raise ValueError(
            f"{words} of the host fails on {', '.join(given)}: {type(error).__name__}: {error}"
        ) from error


def _described(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def cut(blocks: Sequence[nn.Module]) -> dict[str, nn.Sequential]:
    """Split blocks into one segment per slot name (fewer if there are fewer blocks), of about equal
    depth.

    5 blocks give early = blocks 1 and 2, mid = 3 and 4, late = 5. 2 blocks give early and mid.
    """
    if not blocks:
        raise ValueError("expected at least one block, got none: a host needs a depth of 1 or more")
    count = min(len(blocks), len(SLOT_NAMES))
    ends = [math.ceil(len(blocks) * i / count) for i in range(count + 1)]
    return {SLOT_NAMES[i]: nn.Sequential(*blocks[ends[i] : ends[i + 1]]) for i in range(count)}


def cnn_host(
    *, image_size: int, in_channels: int, num_classes: int, width: int = 3, depth: int = 3
) -> Host:
    """A plain CNN from images [N, in_channels, image_size, image_size] to logits [N, num_classes].

    Block i of `depth` is a 3x3 convolution to `width` * 2^i channels, batch norm, a 2x2 max-pool as
    long as the image can be halved, and ReLU. The head takes the mean over positions and is linear.
    """
    sizes = {"image_size": image_size, "in_channels": in_channels, "num_classes": num_classes}
    for name, size in {**sizes, "width": width, "depth": depth}.items():
        require_size(size, name)
    channels = [in_channels, *(width * 2**i for i in range(depth))]
    blocks = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        pool = [nn.MaxPool2d(2)] if image_size >= 2 ** (i + 1) else []
        # ReLU before the pool would give the same values for four times the work.
        layers = [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            *pool,
            nn.ReLU(),
        ]
        blocks.append(nn.Sequential(*layers))
    segments = cut(blocks)
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes)
    )
    depths = itertools.accumulate(map(len, segments.values()))
    return Host(
        "cnn",
        segments,
        head,
        {slot: channels[depth] for slot, depth in zip(segments, depths, strict=True)},
    )
