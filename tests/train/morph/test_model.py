"""Hosts and the model that grows: where they are cut, and seeds added and removed by slot name.

Long file: one model and its fixtures serve all of these tests.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_train.morph.blueprints import Blueprint, BlueprintRegistry, default_registry
from esper_train.morph.config import GrowthConfig
from esper_train.morph.host import Host, cnn_host, cut
from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.morph.model import MorphModel
from esper_train.morph.transformer import transformer_host

ALL = ("early", "mid", "late")


def small_host(depth: int = 3) -> Host:
    torch.manual_seed(0)
    return cnn_host(image_size=8, in_channels=1, num_classes=10, width=3, depth=depth)


def images(n: int = 5, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# the host


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        # convolutions without bias, batch norms with two numbers per channel, the linear head with
        # bias
        (
            {"image_size": 8, "in_channels": 1, "width": 3, "depth": 3},
            (9 * 1 * 3 + 6) + (9 * 3 * 6 + 12) + (9 * 6 * 12 + 24) + (12 * 10 + 10),
        ),
        (
            {"image_size": 8, "in_channels": 2, "width": 5, "depth": 1},
            (9 * 2 * 5 + 10) + (5 * 10 + 10),
        ),
        # the audited system's counts for its CNN of the same form
        ({"image_size": 32, "in_channels": 3, "width": 8, "depth": 3}, 6_418),
        ({"image_size": 32, "in_channels": 3, "width": 32, "depth": 3}, 94_762),
        ({"image_size": 32, "in_channels": 3, "width": 8, "depth": 5}, 99_922),
    ],
)
def test_cnn_host_has_the_parameters_counted_by_hand(
    arguments: dict[str, int], parameters: int
) -> None:
    assert count(cnn_host(num_classes=10, **arguments)) == parameters


@pytest.mark.parametrize(
    ("depth", "channels"),
    [
        (1, {"early": 3}),
        (2, {"early": 3, "mid": 6}),
        (3, {"early": 3, "mid": 6, "late": 12}),
        (4, {"early": 6, "mid": 12, "late": 24}),  # after blocks 2, 3, 4
        (5, {"early": 6, "mid": 24, "late": 48}),  # after blocks 2, 4, 5
        (6, {"early": 6, "mid": 24, "late": 96}),  # after blocks 2, 4, 6
    ],
)
def test_cnn_host_has_the_slots_its_depth_allows(depth: int, channels: dict[str, int]) -> None:
    host = small_host(depth)
    assert host.topology == "cnn"
    assert host.slot_channels == channels
    assert list(host.segments) == list(channels)
    x = images()
    for name, segment in host.segments.items():
        x = segment(x)
        assert x.shape[:2] == (5, channels[name])
    assert host.head(x).shape == (5, 10)


@pytest.mark.parametrize(
    ("depth", "lengths"),
    [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (7, [3, 2, 2])],
)
def test_cut_puts_every_block_into_exactly_one_segment_in_order(
    depth: int, lengths: list[int]
) -> None:
    blocks = [nn.Identity() for _ in range(depth)]
    segments = cut(blocks)
    assert list(segments) == list(ALL[: len(lengths)])
    assert [len(segment) for segment in segments.values()] == lengths
    assert [id(block) for segment in segments.values() for block in segment] == [
        id(block) for block in blocks
    ]


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(8, [4, 2, 1, 1]), (5, [2, 1, 1, 1]), (3, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (1, [1, 1, 1, 1])],
)
def test_cnn_host_stops_pooling_when_the_image_cannot_halve(size: int, sizes: list[int]) -> None:
    host = cnn_host(image_size=size, in_channels=2, num_classes=4, width=2, depth=4)
    x = images(3, 2, size)
    seen = []
    for segment in host.segments.values():
        for block in segment:
            x = block(x)
            seen.append(x.shape[-1])
    assert seen == sizes
    assert host(images(3, 2, size)).shape == (3, 4)


def test_host_refuses_channels_for_other_segments() -> None:
    segments = cut([nn.Identity(), nn.Identity()])
    with pytest.raises(
        ValueError, match=r"each segment \['early', 'mid'\], got them for \['early', 'late'\]"
    ):
        Host("cnn", segments, nn.Flatten(), {"early": 1, "late": 1})


# the model


def model(slots: tuple[str, ...] = ALL, **arguments: Any) -> MorphModel:
    return MorphModel(small_host(), slots, **arguments)


class Affine(nn.Module):
    """z = 2 x + 1 where its parameters are moved so; the identity at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.shift


def affine_registry() -> BlueprintRegistry:
    return BlueprintRegistry([Blueprint("affine", "cnn", Affine)])


def fossilized(*slots: str) -> MorphModel:
    """A model in eval mode with a permanent z = 2 x + 1 in each of the slots."""
    grown = model(registry=affine_registry()).eval()
    for slot in slots:
        state = SlotState(
            slot=slot,
            stage=SeedStage.FOSSILIZED,
            seed_id=f"of_{slot}",
            blueprint="affine",
            alpha=1.0,
        )
        grown.slot(slot).restore(state, grown.registry.require("cnn", "affine"))
        with torch.no_grad():
            for p, value in zip(grown.get_seed_parameters(slot), (2.0, 1.0), strict=True):
                p.fill_(value)
    return grown


def by_hand(host: Host, affine_after: tuple[str, ...]) -> Tensor:
    x = images()
    for name, segment in host.segments.items():
        x = segment(x)
        if name in affine_after:
            x = 2 * x + 1
    return host.head(x)


def snapshot(grown: MorphModel) -> tuple[Any, ...]:
    weights = {name: value.tolist() for name, value in grown.state_dict().items()}
    return [slot.state for slot in grown.slots], [slot.seed for slot in grown.slots], weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slots", [(), ALL, ("mid",)])
def test_morph_model_without_seeds_is_the_host(slots: tuple[str, ...], training: bool) -> None:
    grown = model(slots).train(training)
    bare = small_host().train(training)
    assert torch.equal(grown(images()), bare(images()))
    assert count(grown) == count(bare)


@pytest.mark.parametrize("slot", ALL)
@pytest.mark.parametrize("blueprint", default_registry().names("cnn"))
def test_germinate_seed_changes_no_output(blueprint: str, slot: str) -> None:
    grown = model()
    bare = small_host()
    changes = grown.germinate_seed(blueprint, "s0", slot=slot)
    assert [change.stage.name for change in changes] == ["GERMINATED", "TRAINING"]
    assert torch.equal(grown(images()), bare(images()))
    assert grown.slot(slot).state.seed_id == "s0"
    assert grown.slot(slot).state.blueprint == blueprint


def test_morph_model_lists_slots_in_the_order_of_execution() -> None:
    assert [slot.state.slot for slot in model(("late", "early")).slots] == ["early", "late"]
    assert [slot.channels for slot in model(("late", "early")).slots] == [3, 12]


def test_morph_model_refuses_an_unknown_slot_and_lists_those_of_the_host() -> None:
    with pytest.raises(ValueError, match=r"unknown slot .*'late'.* Known: early, mid$"):
        MorphModel(small_host(depth=2), ("early", "late"))


def test_morph_model_refuses_a_repeated_slot() -> None:
    with pytest.raises(ValueError, match=r"slots are named more than once: mid, early, mid"):
        model(("mid", "early", "mid"))


def test_cull_seed_by_name_empties_that_slot_only() -> None:
    grown = model()
    grown.germinate_seed("norm", "s0", slot="early")
    grown.germinate_seed("attention", "s1", slot="late")
    changes = grown.cull_seed(slot="late", reason="too slow")
    assert (changes[0].stage.name, changes[0].reason) == ("CULLED", "too slow")
    assert [grown.has_active_seed_in_slot(slot) for slot in ALL] == [True, False, False]
    assert grown.slot("late").state.stage is SeedStage.EMBARGOED
    assert grown.slot("early").state.seed_id == "s0"


def test_fossilize_seed_by_name_makes_it_permanent() -> None:
    grown = model(growth=GrowthConfig(fossilize_contribution=2.5))
    blueprint = grown.registry.require("cnn", "norm")
    on_probation = SlotState(
        slot="mid",
        stage=SeedStage.PROBATIONARY,
        seed_id="s0",
        blueprint="norm",
        alpha=1.0,
        contribution=2.5,
        accuracies=(60.0,) * 5,
        contributions=(2.5,) * 5,
        accuracy_before=60.0,
        tolerance=0.0,
    )
    grown.slot("mid").restore(on_probation, blueprint)
    assert grown.fossils == 0
    assert [c.stage.name for c in grown.fossilize_seed(slot="mid")] == ["FOSSILIZED"]
    assert grown.fossils == 1
    assert grown.has_active_seed_in_slot("mid")
    with pytest.raises(ValueError, match="cannot go from FOSSILIZED to CULLED; legal: none"):
        grown.cull_seed(slot="mid")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("norm", "s1", "midd"),
            ValueError,
            r"unknown slot 'midd'; perhaps 'mid'\? Known: early, mid, late",
        ),
        (("nrm", "s1", "mid"), ValueError, r"unknown cnn blueprint 'nrm'; perhaps 'norm'\?"),
        (("mlp", "s1", "mid"), ValueError, r"unknown cnn blueprint 'mlp'"),
        (
            ("norm", "s1", "early"),
            ValueError,
            r"slot 'early' cannot go from TRAINING to GERMINATED",
        ),
        (("norm", "s0", "mid"), RuntimeError, r"a seed with the id 's0' is already seated"),
        (("norm", "s0", "early"), RuntimeError, r"a seed with the id 's0' is already seated"),
    ],
)
def test_germinate_seed_is_refused_and_changes_nothing(
    arguments: tuple[str, str, str], error: type[Exception], message: str
) -> None:
    grown = model()
    grown.germinate_seed("attention", "s0", slot="early")
    before = snapshot(grown)
    blueprint, seed_id, slot = arguments
    with pytest.raises(error, match=message):
        grown.germinate_seed(blueprint, seed_id, slot=slot)
    assert snapshot(grown) == before


def test_germinate_seed_refuses_an_unknown_blend_and_changes_nothing() -> None:
    grown = model()
    before = snapshot(grown)
    with pytest.raises(ValueError, match=r"unknown blend 'gatd'.* Known: linear, sigmoid, gated"):
        grown.germinate_seed("norm", "s0", slot="mid", blend="gatd")
    assert snapshot(grown) == before


def test_germinate_seed_may_reuse_the_id_of_a_culled_seed() -> None:
    grown = model()
    grown.germinate_seed("norm", "s0", slot="early")
    grown.cull_seed(slot="early")
    grown.germinate_seed("norm", "s0", slot="mid")
    assert [slot.state.seed_id for slot in grown.slots] == [None, "s0", None]


@pytest.mark.parametrize("method", ["cull_seed", "fossilize_seed"])
def test_requests_to_an_unknown_or_empty_slot_are_refused_and_change_nothing(method: str) -> None:
    grown = model(("early", "mid"))
    grown.germinate_seed("norm", "s0", slot="mid")
    before = snapshot(grown)
    with pytest.raises(ValueError, match=r"unknown slot 'late'.* Known: early, mid$"):
        getattr(grown, method)(slot="late")
    with pytest.raises(
        ValueError, match=r"slot 'early' cannot go from DORMANT to .* legal: GERMINATED"
    ):
        getattr(grown, method)(slot="early")
    assert snapshot(grown) == before


def test_slot_and_parameters_of_an_unknown_slot_are_refused() -> None:
    grown = model(("early",))
    with pytest.raises(ValueError, match=r"unknown slot 'earl'; perhaps 'early'\?"):
        grown.slot("earl")
    with pytest.raises(ValueError, match=r"unknown slot 'mid'"):
        grown.has_active_seed_in_slot("mid")
    with pytest.raises(ValueError, match=r"unknown slot 'mid'"):
        list(grown.get_seed_parameters("mid"))


def test_seed_and_host_parameters_are_disjoint_and_complete() -> None:
    grown = model()
    grown.germinate_seed("conv_light", "s0", slot="early")
    grown.germinate_seed("norm", "s1", slot="late")
    early, late, seeds, host = (
        [id(p) for p in parameters]
        for parameters in (
            grown.get_seed_parameters("early"),
            grown.get_seed_parameters("late"),
            grown.get_seed_parameters(),
            grown.get_host_parameters(),
        )
    )
    assert list(grown.get_seed_parameters("mid")) == []
    assert seeds == early + late
    assert host == [id(p) for p in grown.host.parameters()]
    everything = [id(p) for p in grown.parameters()]
    assert sorted(seeds + host) == sorted(everything)
    assert len(set(everything)) == len(everything)
    # 1 x 1 and 3 x 3 convolutions and a group norm at 3 channels; a group norm and a gain at 12
    assert sum(p.numel() for p in grown.get_seed_parameters("early")) == 3 * 3 * 9 + 6 + 3 * 3 + 3
    assert sum(p.numel() for p in grown.get_seed_parameters("late")) == 24 + 1


@pytest.mark.parametrize(
    ("alpha", "affine_after"),
    [
        (None, ("early", "late")),
        ({}, ("early", "late")),
        ({"early": 0.0}, ("late",)),
        ({"late": 0.0}, ("early",)),
        ({"late": 0.0, "early": 0.0}, ()),
        ({"mid": 0.0}, ("early", "late")),
        ({"early": 1.0}, ("early", "late")),
    ],
)
def test_forward_under_an_alpha_override_is_the_network_without_those_seeds(
    alpha: dict[str, float] | None, affine_after: tuple[str, ...]
) -> None:
    grown = fossilized("early", "late")
    before = snapshot(grown)
    torch.testing.assert_close(grown(images(), alpha=alpha), by_hand(grown.host, affine_after))
    assert snapshot(grown) == before
    torch.testing.assert_close(grown(images()), by_hand(grown.host, ("early", "late")))


def test_forward_without_any_seed_of_a_grown_model_is_exactly_the_host() -> None:
    grown = fossilized("early", "mid", "late")
    assert torch.equal(
        grown(images(), alpha=dict.fromkeys(ALL, 0.0)), small_host().eval()(images())
    )


def test_has_active_seed_in_slot_counts_fossils() -> None:
    grown = fossilized("mid")
    assert [grown.has_active_seed_in_slot(slot) for slot in ALL] == [False, True, False]
    assert grown.fossils == 1


def test_state_dict_restores_a_model_whose_slots_were_restored() -> None:
    saved = fossilized("early")
    blending = SlotState(
        slot="late",
        stage=SeedStage.BLENDING,
        seed_id="b",
        blueprint="affine",
        blend="linear",
        alpha=0.25,
    )
    affine = saved.registry.require("cnn", "affine")
    saved.slot("late").restore(blending, affine)
    with torch.no_grad():
        for p in saved.get_seed_parameters("late"):
            p.fill_(-3.0)
        saved(images())
    torch.manual_seed(99)  # another host, so that every weight must come from the state dict
    other = cnn_host(image_size=8, in_channels=1, num_classes=10, width=3, depth=3)
    fresh = MorphModel(other, ALL, registry=affine_registry()).eval()
    for slot in saved.slots:
        fresh.slot(slot.state.slot).restore(slot.state, affine if slot.state.blueprint else None)
    assert not torch.equal(fresh(images()), saved(images()))
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(images()), saved(images()))
    assert [slot.state for slot in fresh.slots] == [slot.state for slot in saved.slots]
    assert [float(slot.alpha) for slot in fresh.slots] == [1.0, 0.0, 0.25]


def test_morph_model_grows_a_sequence_host() -> None:
    torch.manual_seed(0)
    host = transformer_host(vocab_size=32, context=7, width=6, depth=4)
    tokens = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(1))
    before = host(tokens)
    assert before.shape == (3, 7, 32)
    grown = MorphModel(host, ("early", "late"))
    grown.germinate_seed("mlp", "s0", slot="early")
    grown.germinate_seed("norm", "s1", slot="late")
    assert torch.equal(grown(tokens), before)
    with pytest.raises(
        ValueError, match=r"unknown transformer blueprint 'conv_light'.* Known: mlp"
    ):
        MorphModel(host, ("mid",)).germinate_seed("conv_light", "s0", slot="mid")


def test_morph_models_do_not_share_slots() -> None:
    first = model()
    second = model()
    first.germinate_seed("norm", "s0", slot="mid")
    assert not second.has_active_seed_in_slot("mid")
    assert second.slot("mid").state == SlotState(slot="mid")


def test_forward_refuses_an_alpha_for_a_slot_that_is_not_there() -> None:
    model = MorphModel(cnn_host(image_size=8, in_channels=1, num_classes=10), ("early",))
    with pytest.raises(ValueError, match=r"'earyl'; perhaps 'early'"):
        model(torch.zeros(1, 1, 8, 8), alpha={"earyl": 0.0})


def test_cnn_host_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        cnn_host(image_size=8, in_channels=1, num_classes=10, depth=0)


def test_an_incubating_seed_leaves_the_hosts_gradients_as_they_are_bit_for_bit() -> None:
    """Isolation ensures it, whatever the seed has learned; the seed itself does receive
    gradients."""
    images = torch.randn(6, 1, 8, 8)
    targets = torch.arange(6)
    gradients = []
    for blueprint in (None, *default_registry().names("cnn")):
        torch.manual_seed(0)
        growth = GrowthConfig(incubation="straight_through")
        grown = MorphModel(
            cnn_host(image_size=8, in_channels=1, num_classes=10),
            ("early", "mid", "late"),
            growth=growth,
        )
        if blueprint is not None:
            for slot in grown.slots:
                grown.germinate_seed(blueprint, f"seed in {slot.state.slot}", slot=slot.state.slot)
            for p in grown.get_seed_parameters():
                nn.init.normal_(p)
        nn.functional.cross_entropy(grown(images), targets).backward()
        gradients.append([p.grad for p in grown.get_host_parameters()])
        assert all(p.grad is not None for p in grown.get_seed_parameters())
    for others in gradients[1:]:
        assert all(torch.equal(ours, bare) for ours, bare in zip(others, gradients[0], strict=True))


@pytest.mark.parametrize(
    "stage", [SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED]
)
def test_alpha_0_is_the_absent_seed_and_alpha_1_the_seed_alone(stage: SeedStage) -> None:
    torch.manual_seed(0)
    grown = MorphModel(cnn_host(image_size=8, in_channels=1, num_classes=10), ("mid",)).eval()
    slot = grown.slot("mid")
    state = SlotState(slot="mid", stage=stage, blueprint="conv_light", blend="linear", alpha=1.0)
    slot.restore(state, grown.registry.require("cnn", "conv_light"))
    assert slot.seed is not None
    for p in slot.seed.parameters():
        nn.init.normal_(p)
    images = torch.randn(6, 1, 8, 8)
    assert torch.equal(grown(images, alpha={"mid": 0.0}), grown.host(images))
    early, mid, late = grown.host.segments.values()
    by_hand = grown.host.head(late(slot.seed(mid(early(images)))))
    assert torch.equal(grown(images), by_hand)


def test_only_trainable_matrices_of_the_host_shrink() -> None:
    model = MorphModel(small_host())
    model.host.head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.shrink_host(0.5)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    trainable = {f"host.{n}" for n, p in model.host.named_parameters() if p.requires_grad}
    assert changed == {name for name in trainable if before[name].dim() > 1}
    assert all(torch.equal(model.state_dict()[name], before[name] / 2) for name in changed)
