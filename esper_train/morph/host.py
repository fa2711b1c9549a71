"""Host networks: a chain of segments with a slot after each, then a head."""

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from esper_train.morph.blueprints import Topology

SLOT_NAMES = ("early", "mid", "late")


class Host(nn.Module):
    """A network cut into segments, so that a seed can be seated after each of them.

    Args:
        topology: "cnn" for features [N, C, H, W], "transformer" for [N, T, C]; decides which blueprints fit.
        segments: slot name to the module whose output the slot sees, in order of execution.
        head: from the last segment's features to logits.
        slot_channels: slot name to C, the channels of the features there.
    """

    def __init__(
        self, topology: Topology, segments: Mapping[str, nn.Module], head: nn.Module, slot_channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        if set(segments) != set(slot_channels):
            raise ValueError(f"expected channels for each segment {list(segments)}, got them for {list(slot_channels)}")
        self.topology = topology
        self.segments = nn.ModuleDict(segments)
        self.head = head
        self.slot_channels = dict(slot_channels)

    def forward(self, x: Tensor) -> Tensor:
        for segment in self.segments.values():
            x = segment(x)
        return self.head(x)


def cut(blocks: Sequence[nn.Module]) -> dict[str, nn.Sequential]:
    """Cut a chain of blocks into segments, as many as there are slot names or blocks, of about equal depth.

    5 blocks make early = blocks 1 and 2, mid = 3 and 4, late = 5; 2 blocks have no late.
    """
    if not blocks:
        raise ValueError("expected at least one block, got none: a host needs a depth of 1 or more")
    count = min(len(blocks), len(SLOT_NAMES))
    ends = [math.ceil(len(blocks) * i / count) for i in range(count + 1)]
    return {SLOT_NAMES[i]: nn.Sequential(*blocks[ends[i] : ends[i + 1]]) for i in range(count)}


def cnn_host(*, image_size: int, in_channels: int, num_classes: int, width: int = 3, depth: int = 3) -> Host:
    """Plain CNN over images [N, in_channels, image_size, image_size], logits [N, num_classes].

    Block i of `depth` is a 3x3 convolution to `width` * 2^i channels, batch norm, a 2x2 max-pool while the image is
    large enough to halve, and ReLU; then the mean over positions and a linear head.
    """
    channels = [in_channels, *(width * 2**i for i in range(depth))]
    blocks = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        pool = [nn.MaxPool2d(2)] if image_size >= 2 ** (i + 1) else []
        # ReLU is the same before the pool and after it, but for four times the work
        layers = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), *pool, nn.ReLU()]
        blocks.append(nn.Sequential(*layers))
    segments = cut(blocks)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))
    depths = itertools.accumulate(map(len, segments.values()))
    return Host("cnn", segments, head, {slot: channels[depth] for slot, depth in zip(segments, depths, strict=True)})
