"""Turns a grown model into a plain network that loads without Esper: fossilized seeds, but no
slots."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from esper_train.base.names import require_type
from esper_train.morph.lifecycle import SeedStage
from esper_train.morph.model import MorphModel


def fold(model: MorphModel) -> nn.Sequential:
    """A copy of the network as a plain chain: each segment, its fossilized seed if it has one, the
    head.

    The outputs equal the model's, bit for bit. A seed in TRAINING does not contribute to them and
    is left out. A seed that is being blended in or is on probation raises `ValueError`: it may
    still be culled.
    """
    require_type(model, MorphModel, "model", "`load_run` gives one, and EpisodeResult.model is one")
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for name, segment in model.host.segments.items():
        chain[name] = segment
        slot = model.slot(name) if name in model.seed_slots else None
        if slot is None or slot.seed is None or slot.state.stage is SeedStage.TRAINING:
            continue
        if slot.state.stage is not SeedStage.FOSSILIZED:
            stage = slot.state.stage.name
            raise ValueError(
                f"slot {name!r} has a seed in {stage}: fossilize or cull it before the network is "
                "folded"
            )
        chain[f"{name}_seed"] = slot.seed
    chain["head"] = model.host.head
    return copy.deepcopy(nn.Sequential(chain))


def export(model: MorphModel, example: Tensor) -> ExportedProgram:
    """The folded network of `model` in eval mode as a program for any batch size, which torch alone
    can load and run.

    `example` is an input [N, ...] with N >= 2. Save the program with `torch.export.save(program,
    path)`, and load it as a module with `torch.export.load(path).module()`.
    """
    require_type(example, Tensor, "example", "pass one input [N, ...] with N of at least 2")
    folded = fold(model).eval()
    return torch.export.export(folded, (example,), dynamic_shapes=({0: Dim.DYNAMIC},))
