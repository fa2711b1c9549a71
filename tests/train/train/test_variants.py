"""`evaluate` with ablated slots: nothing in front of the first of them is computed again, and no
number changes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_kernels import Meter
from esper_train import (
    Host,
    MorphModel,
    SeedStage,
    TrainConfig,
    cnn_host,
    evaluate,
    transformer_host,
)
from esper_train.train.step import build_train_step

CONFIG = TrainConfig()
SLOTS = ("early", "mid", "late")
VARIANTS = {
    "late": {"late": 0.0},
    "early": {"early": 0.0},
    "mid": {"mid": 0.0},
    "half": {"mid": 0.5},
    "joint": {"late": 0.0, "mid": 0.0},
    "same": {},
}


class Plain(nn.Module):
    """The same model with nothing but `alpha` in its interface."""

    def __init__(self, model: MorphModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, alpha: Mapping[str, float] | None = None) -> Tensor:
        return self.model(x, alpha=alpha)


def grown(host: Host, blueprint: str) -> MorphModel:
    """A fossil that does something in every slot."""
    model = MorphModel(host, SLOTS)
    for name in SLOTS:
        model.germinate_seed(blueprint, name, slot=name)
        slot = model.slot(name)
        fossil = replace(slot.state, stage=SeedStage.FOSSILIZED, alpha=1.0)
        slot.restore(fossil, model.registry.require(host.topology, blueprint))
        for parameter in slot.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def images(topology: str = "cnn") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    if topology == "transformer":
        return [(integers(10, n, 8), integers(10, n, 8)) for n in (16, 5)]
    return [(torch.randn(n, 1, 8, 8, generator=generator), integers(10, n)) for n in (16, 5)]


def model_of(topology: str) -> MorphModel:
    torch.manual_seed(0)
    if topology == "cnn":
        return grown(cnn_host(image_size=8, in_channels=1, num_classes=10), "conv_expand")
    return grown(transformer_host(vocab_size=10, context=8, width=8), "mlp")


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_variants_are_those_of_whole_passes_bit_for_bit(topology: str) -> None:
    model = model_of(topology)
    task_type = "lm" if topology == "transformer" else "classification"
    shared, whole = (
        evaluate(m, images(topology), CONFIG, task_type=task_type, variants=VARIANTS)
        for m in (model, Plain(model))
    )
    assert replace(shared, seconds=0.0) == replace(whole, seconds=0.0)
    losses = [shared.loss, *(shared.variants[name].loss for name in VARIANTS if name != "same")]
    assert len(set(losses)) == len(losses)  # each of them is another network
    assert shared.variants["same"].loss == shared.loss


def test_each_variant_begins_at_its_first_slot() -> None:
    model = model_of("cnn")
    calls = Counter[str]()
    for name, module in (*model.host.segments.items(), ("head", model.host.head)):
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    variants = {name: VARIANTS[name] for name in ("late", "early", "mid", "joint")}
    evaluate(model, images()[:1], CONFIG, task_type="classification", variants=variants)
    # early: its own pass. mid: also with early ablated. late: also with early, with mid, and with
    # both of joint
    assert calls == {"early": 1, "mid": 2, "late": 4, "head": 5}


@pytest.mark.parametrize("inference", [False, True])
def test_a_segment_that_changes_its_input_in_place_spoils_no_variant(inference: bool) -> None:
    model = model_of("cnn")
    model.host.segments["late"] = nn.Sequential(nn.ReLU(inplace=True), model.host.segments["late"])
    with torch.no_grad():
        for parameter in model.slot("mid").parameters():
            # this seed's slot gives its input on, which the next segment then changes
            parameter.zero_()
    variants = {"mid": {"mid": 0.0}, "late": {"late": 0.0}}
    with torch.inference_mode(inference):
        shared, whole = (
            evaluate(m, images(), CONFIG, task_type="classification", variants=variants)
            for m in (model, Plain(model))
        )
    assert replace(shared, seconds=0.0) == replace(whole, seconds=0.0)


def test_what_enters_the_slots_of_a_host_that_works_in_place_is_not_kept() -> None:
    torch.manual_seed(0)
    model = MorphModel(cnn_host(image_size=8, in_channels=1, num_classes=10), SLOTS).eval()
    x = images()[0][0]
    with torch.no_grad():
        assert list(model.forward_keeping(x)[1]) == list(SLOTS)
        model.host.segments["late"] = nn.Sequential(
            nn.ReLU(inplace=True), model.host.segments["late"]
        )
        logits, entered = model.forward_keeping(x)
    assert entered == {}
    torch.testing.assert_close(logits, model(x))


@pytest.mark.parametrize("alpha", [{"late": 0.0, "mdi": 0.0}, {"mdi": 0.0}])
def test_a_misspelt_slot_is_refused(alpha: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"unknown slot 'mdi'; perhaps 'mid'"):
        evaluate(
            model_of("cnn"), images(), CONFIG, task_type="classification", variants={"x": alpha}
        )


def test_start_at_an_unknown_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown slot 'last'"):
        model_of("cnn")(images()[0][0], start="last")


def test_logits_of_another_rank_are_refused_in_a_variant_too() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, alpha: Any = None) -> Tensor:
            return x if alpha is None else x[None]

    step = build_train_step("classification", CONFIG)
    meters = [Meter("cpu"), Meter("cpu")]
    with pytest.raises(ValueError, match=r"expects logits \[N, V\], got \(1, 4, 3\)"):
        step.measure(Odd(), torch.randn(4, 3), torch.zeros(4).long(), meters, [{"early": 0.0}])
