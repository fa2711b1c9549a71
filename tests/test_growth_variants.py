"""Other ways to grow: what they do after a merge, and how their figures are kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD

from benchmarks import growth_runs, growth_variants
from esper_train import GrowthConfig, HostConfig, MorphModel, SeedStage
from esper_train.morph.lifecycle import SlotState
from esper_train.train.optimizers import OptimizerRegistry


def test_a_row_takes_the_place_of_an_earlier_one_about_the_same_run() -> None:
    rows: list[dict[str, Any]] = [
        {"variant": "early", "epochs": 75, "seed": seed, "grown": 95.0} for seed in (0, 1)
    ]
    first = {"variant": growth_variants.PROMISING, "epochs": 75, "seed": 0, "grown": 90.0}
    again = {**rows[0], "grown": 96.0}
    found = growth_variants.with_row(growth_variants.with_row(rows, first), again)
    assert found == [first, again, rows[1]]


def test_a_merge_raises_the_rates_of_host_and_fossils_for_a_while() -> None:
    optimizers = OptimizerRegistry(
        **{name: SGD([torch.zeros(1)], lr=0.5) for name in ("host", "early", "late")}
    )
    fossil = SlotState(slot="early", stage=SeedStage.FOSSILIZED)
    model = SimpleNamespace(fossils=0, slots=[SimpleNamespace(state=fossil)])
    episode: Any = SimpleNamespace(model=model, optimizers=optimizers)
    then = growth_variants.RaisedRates()
    rates = []
    for fossils in (0, *[1] * 12):
        model.fossils = fossils
        then(episode)
        host, early, late = (made.param_groups[0]["lr"] for made in optimizers.present())
        assert (host, late) == (early, 0.5)
        rates.append(host)
    assert rates == pytest.approx([0.5, *(1.5 - 0.1 * number for number in range(11)), 0.5])


def test_a_fossil_is_pruned_when_its_contribution_is_gone() -> None:
    growth = GrowthConfig(window=2)
    model = MorphModel(
        growth_runs.OWN["breast-cancer"].build_host(HostConfig()), ("early", "late"), growth=growth
    )
    fossils = {"early": (1.0, -1.0), "late": (1.0, -0.5)}
    norm = model.registry.require("features", "norm")
    for name, contributions in fossils.items():
        state = SlotState(
            slot=name,
            seed_id=name,
            blueprint="norm",
            stage=SeedStage.FOSSILIZED,
            alpha=1.0,
            contributions=contributions[:1],
        )
        model.slot(name).restore(state, norm)
    optimizers = OptimizerRegistry(**{name: SGD([torch.zeros(1)], lr=0.5) for name in fossils})
    episode: Any = SimpleNamespace(model=model, optimizers=optimizers)
    growth_variants.prune_fossils(episode)
    assert model.fossils == 2  # one measurement of two
    for name, contributions in fossils.items():
        slot = model.slot(name)
        slot.state = replace(slot.state, contributions=contributions)
    growth_variants.prune_fossils(episode)
    assert [slot.state.slot for slot in model.slots if slot.seed is not None] == ["late"]
    assert "early" not in optimizers
    model(torch.zeros(2, 30))


def test_a_merge_renews_the_host_once() -> None:
    config = growth_runs.config_of("breast-cancer")
    task = growth_runs.task_named("breast-cancer", config)
    host = task.build_host(config.host)
    weight = host.get_parameter("head.weight")
    before = weight.detach().clone()
    random = torch.get_rng_state()
    model = SimpleNamespace(fossils=0, host=host)
    episode: Any = SimpleNamespace(model=model, config=config)
    then = growth_variants.RenewedHost(task)
    then(episode)
    assert torch.equal(weight, before)
    model.fossils = 1
    then(episode)
    after = weight.detach().clone()
    then(episode)
    assert torch.equal(weight, after)
    assert torch.equal(random, torch.get_rng_state())
    torch.manual_seed(1)
    new = task.build_host(config.host).get_parameter("head.weight")
    torch.testing.assert_close(after, 0.7 * before + 0.3 * new)


def test_the_cost_until_each_merge_is_kept() -> None:
    then = growth_variants.MergeCosts()
    for fossils, cost in ((0, 1.5), (1, 3.0), (1, 4.5), (2, 6.0)):
        episode: Any = SimpleNamespace(
            model=SimpleNamespace(fossils=fossils), cost=SimpleNamespace(epochs=cost)
        )
        then(episode)
    assert then.costs == [3.0, 6.0]


def test_a_static_network_shrinks_after_given_epochs() -> None:
    model = MorphModel(growth_runs.OWN["breast-cancer"].build_host(HostConfig()))
    layer = model.host.output_layer
    assert layer is not None
    weight, bias = (p.detach().clone() for p in layer.parameters())
    episode: Any = SimpleNamespace(model=model)
    then = growth_variants.ShrunkAfter([2, 3, 3])
    for factor in (1.0, 0.5, 0.125, 0.125):
        then(episode)
        assert torch.equal(layer.weight, factor * weight)
    assert torch.equal(layer.bias, bias)
