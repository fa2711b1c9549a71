"""A host is tried before a run begins: what it promises of its features is compared with what comes
out."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper_train import Blueprint, BlueprintRegistry, Host, HostConfig, cnn_host, default_registry
from esper_train.morph.blueprints import FEATURES, PROBE_SHAPES
from esper_train.morph.host import check_host
from tests.helpers.own import COLUMNS, perceptron, residual_host

IMAGES = torch.zeros(2, 1, 8, 8)


def host(topology: str = "cnn", channels: int = 4, segment: nn.Module | None = None) -> Host:
    """One segment with a slot, from images [N, 1, 8, 8] to two classes."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    segments = {"early": segment or nn.Conv2d(1, 4, 3, padding=1)}
    return Host(topology, segments, head, {"early": channels})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "inputs", "classes"),
    [
        (lambda: host(), IMAGES, 2),
        (lambda: residual_host(HostConfig()), IMAGES, 3),
        (lambda: perceptron(HostConfig()), torch.zeros(2, COLUMNS), 3),
        (lambda: cnn_host(image_size=8, in_channels=1, num_classes=5), IMAGES, 5),
    ],
)
def test_a_host_as_promised_gives_its_logits(
    made: Callable[[], Host], inputs: Tensor, classes: int
) -> None:
    assert check_host(made(), inputs).shape == (2, classes)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            lambda: host(channels=6),
            "slot_channels says 6 channels for segment 'early', but it gives 4: features "
            "[2, 4, 8, 8], that is [N, C, H, W]",
        ),
        (
            lambda: host("transformer"),
            "topology 'transformer' has features [N, T, C], but segment 'early' gives shape "
            "[2, 4, 8, 8]",
        ),
        (lambda: host("graph"), "unknown topology 'graph'"),
        (
            lambda: host(segment=nn.Conv2d(3, 4, 3)),
            "segment 'early' of the host fails on shape [2, 1, 8, 8]: RuntimeError",
        ),
        (
            lambda: host(segment=nn.Conv2d(1, 4, 3)),
            "the head of the host fails on shape [2, 4, 6, 6]: RuntimeError",
        ),
        (
            lambda: host("features", 4, nn.LSTM(8, 4)),
            "segment 'early' of the host fails on shape [2, 1, 8, 8]",
        ),
    ],
)
def test_a_host_that_is_not_as_promised_is_refused(made: Callable[[], Host], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_host(made(), IMAGES)


def test_features_that_are_no_tensor_are_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match="but segment 'early' gives tuple"):
        check_host(host(segment=Pair()), IMAGES)


def test_the_trial_changes_nothing_of_the_host() -> None:
    made = residual_host(HostConfig())
    made.segments["one"].eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    modes = [module.training for module in made.modules()]
    check_host(made, torch.randn(2, 1, 8, 8))
    assert [module.training for module in made.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_every_topology_has_blueprints_and_a_place_for_channels() -> None:
    assert set(FEATURES) == set(PROBE_SHAPES)
    for topology, (shape, dim) in FEATURES.items():
        assert default_registry().names(topology)
        assert shape.strip("[]").split(", ")[dim] == "C"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda channels: nn.Linear(channels + 1, channels), "RuntimeError: mat1 and mat2"),
        (lambda channels, size: nn.Identity(), "TypeError"),
        (lambda channels: None, "TypeError: what it builds must be of type Module, got None"),
        (lambda channels: nn.Flatten(2), "IndexError"),
        (lambda channels: channels.width, "AttributeError: 'int' object"),
    ],
)
def test_a_blueprint_that_fails_its_check_names_itself(
    build: Callable[[int], nn.Module], words: str
) -> None:
    registry = BlueprintRegistry()
    name = r"blueprint 'broken' fails on features of shape \[2, 8\], that is \[N, C\]: "
    with pytest.raises(ValueError, match=name + words):
        registry.register(Blueprint("broken", "features", build))
    assert registry.names("features") == ()
