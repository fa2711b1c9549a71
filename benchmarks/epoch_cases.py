"""The cases of the benchmark `epoch`: models, data, and what a run chooses for them by default."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from esper_train import MorphModel, SeedStage, cnn_host, get_task, transformer_host
from esper_train.config import preset
from esper_train.train.data import Split

SLOTS = ("early", "mid", "late")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and its data; `classes` is the vocabulary of a language model."""

    kind: str
    width: int
    batch: int
    classes: int = 10
    slots: int = 1
    samples: int = 1024


CASES = {
    "tiny": Case(kind="digits", width=3, batch=16, samples=64),
    "digits:8x64": Case(kind="digits", width=8, batch=64),
    "digits:8x256": Case(kind="digits", width=8, batch=256),
    "digits:32x64": Case(kind="digits", width=32, batch=64),
    "digits:32x256": Case(kind="digits", width=32, batch=256),
    "cifar:32x64": Case(kind="cifar", width=32, batch=64, samples=512),
    "pysource:64x32": Case(kind="pysource", width=64, batch=32, classes=256, samples=512),
    "lm:64x8x32768": Case(kind="lm", width=64, batch=8, classes=32768, samples=64),
    **{
        f"batch:{b}": Case(kind="generated", width=8, batch=b, samples=2048)
        for b in (16, 64, 256, 1024)
    },
    **{
        f"classes:{c}": Case(kind="generated", width=8, batch=64, classes=c)
        for c in (10, 100, 1000, 10000)
    },
    **{f"slots:{s}": Case(kind="generated", width=8, batch=64, slots=s) for s in (0, 1, 2, 3)},
}


def data_of(case: Case) -> Split:
    """Inputs and targets to train with; the same are used to validate."""
    generator = torch.Generator().manual_seed(0)
    if case.kind in ("digits", "pysource"):
        inputs, targets = get_task(case.kind).load().train
        return inputs[: case.samples].contiguous(), targets[: case.samples].contiguous()
    if case.kind == "lm":
        tokens = torch.randint(case.classes, (case.samples, 65), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    shape = (3, 32, 32) if case.kind == "cifar" else (1, 8, 8)
    targets = torch.randint(case.classes, (case.samples,), generator=generator)
    return torch.randn(case.samples, *shape, generator=generator), targets


def model_of(case: Case) -> MorphModel:
    """A host with a fossil in each of the first `slots` slots."""
    torch.manual_seed(0)
    if case.kind in ("pysource", "lm"):
        host = transformer_host(vocab_size=case.classes, context=64, width=case.width)
        blueprint = "mlp"
    else:
        size, channels = (32, 3) if case.kind == "cifar" else (8, 1)
        host = cnn_host(
            image_size=size, in_channels=channels, num_classes=case.classes, width=case.width
        )
        blueprint = "conv_light"
    model = MorphModel(host, SLOTS)
    for name in SLOTS[: case.slots]:
        model.germinate_seed(blueprint, name, slot=name)
        slot = model.slot(name)
        fossil = replace(slot.state, stage=SeedStage.FOSSILIZED, alpha=1.0)
        slot.restore(fossil, model.registry.require(host.topology, blueprint))
    return model


def images_pay_channels_last(case: Case) -> bool:
    """Whether a run of this case uses channels-last by default."""
    return case.width >= 16 and case.kind in ("digits", "cifar", "generated")


def evaluation_batch(case: Case) -> int:
    """The validation batch size that a run with such data uses by default."""
    task = {"cifar": "cifar10", "pysource": "pysource", "lm": "pysource"}.get(case.kind, "digits")
    return preset(task).evaluation_batch
