"""Folding a grown network: the same outputs, bit for bit, loaded without our packages."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from esper_train import MorphModel, SeedStage, cnn_host, default_registry
from esper_train.morph.export import export, fold

CNN_BLUEPRINTS = default_registry().names("cnn")
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def grown(blueprint: str = "conv_expand", stage: SeedStage = SeedStage.FOSSILIZED) -> MorphModel:
    """A model with random weights throughout and a seed in `mid`."""
    torch.manual_seed(0)
    model = MorphModel(cnn_host(image_size=8, in_channels=1, num_classes=10), ("early", "mid"))
    model.germinate_seed(blueprint, "seed_0", slot="mid")
    slot = model.slot("mid")
    alpha = 0.0 if stage is SeedStage.TRAINING else 1.0
    slot.restore(
        replace(slot.state, stage=stage, alpha=alpha), model.registry.require("cnn", blueprint)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("blueprint", CNN_BLUEPRINTS)
def test_fold_gives_the_same_outputs_bit_for_bit(blueprint: str) -> None:
    model = grown(blueprint)
    folded = fold(model)
    assert torch.equal(folded(IMAGES), model(IMAGES))
    # the seed has its part
    assert not torch.equal(folded(IMAGES), model(IMAGES, alpha={"mid": 0.0}))
    assert list(dict(folded.named_children())) == ["early", "mid", "mid_seed", "late", "head"]
    assert "alpha" not in folded.state_dict()


def test_fold_copies_the_weights() -> None:
    model = grown()
    folded = fold(model)
    before = model(IMAGES)
    for parameter in folded.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(IMAGES), before)


def test_fold_leaves_out_a_seed_that_has_no_part_yet() -> None:
    model = grown(stage=SeedStage.TRAINING)
    with torch.no_grad():
        assert torch.equal(fold(model)(IMAGES), model(IMAGES))
    assert "mid_seed" not in dict(fold(model).named_children())


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.PROBATIONARY])
def test_fold_refuses_a_seed_whose_fate_is_open(stage: SeedStage) -> None:
    with pytest.raises(ValueError, match=f"'mid' has a seed in {stage.name}"):
        fold(grown(stage=stage))


def test_export_needs_torch_alone_to_load(tmp_path: Path) -> None:
    """Another process, without our packages, gets the same bits, with another batch size too."""
    model = grown()
    torch.export.save(export(model, IMAGES), tmp_path / "network.pt2")
    expected: list[Tensor] = [model(IMAGES), model(IMAGES[:3])]
    torch.save([IMAGES, IMAGES[:3]], tmp_path / "inputs.pt")
    code = """
import sys, torch
sys.modules["esper_train"] = sys.modules["esper_kernels"] = None  # an import of either would fail
network = torch.export.load("network.pt2").module()
torch.save([network(x) for x in torch.load("inputs.pt")], "outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    for ours, theirs in zip(expected, torch.load(tmp_path / "outputs.pt"), strict=True):
        assert torch.equal(ours, theirs)


def test_a_plain_network_is_named() -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be of type MorphModel, got Linear.*load_run"):
        fold(plain)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"host must be of type Host, got Linear.*make a Host"):
        MorphModel(plain)  # type: ignore[arg-type]
