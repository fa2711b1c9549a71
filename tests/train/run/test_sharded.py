"""FSDP2: parameters that are divided among processes are trained as one process trains them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from esper_train import (
    AmpConfig,
    CompileConfig,
    Decision,
    GradConfig,
    Op,
    RunConfig,
    TrainConfig,
    load_run,
)
from esper_train.run.directory import CHECKPOINTS
from tests.helpers import ranks
from tests.helpers.ranks import fitted, life, result_of, tables, texts, together
from tests.helpers.scripted import Script, germinate
from tests.helpers.sharded import (
    CONFIG,
    FSDP2,
    SCENARIOS,
    SHARDED_FITS,
    SHARDED_LIVES,
    STOPS,
    all_scenarios,
)
from tests.train.run.test_ranks import (
    WHOLE_LIFE,
    assert_same_life,
    assert_same_measures,
    assert_same_weights,
)

pytestmark = pytest.mark.timeout(900)  # the fixture runs all scenarios
Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The findings of the two ranks in each scenario, and the directory that they wrote to."""
    directory = tmp_path_factory.mktemp("sharded")
    first, second = together(2, all_scenarios, directory)
    return {name: [first[name], second[name]] for name in SCENARIOS} | {"directory": [directory]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED_FITS)
def test_training_is_that_of_one_process(name: str, found: Found) -> None:
    make, config = SHARDED_FITS[name]
    one = fitted(make(), config)
    for rank in found[name]:
        assert_same_weights(rank["weights"], one["weights"], 1e-9)
        assert_same_measures(rank["train"], one["train"], 1e-9)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-6, nan_ok=True)


@pytest.mark.slow
def test_strategies_continue_each_others_runs(found: Found) -> None:
    unbroken = fitted(texts(), replace(CONFIG, max_epochs=4))
    for weights in found["turns"]:
        assert_same_weights(weights, unbroken["weights"], 1e-9)
    (directory,) = found["directory"]
    network = load_run(directory / "turns", task=texts())
    assert_same_weights(dict(network.state_dict()), unbroken["weights"], 1e-9)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(found: Found) -> None:
    assert found["stopped"] == [{"signal": 15, "steps": 8}] * 2
    (directory,) = found["directory"]
    written = (directory / "stopped" / CHECKPOINTS).glob("*.pt")
    assert [path.name for path in written] == ["epoch-1.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED_LIVES)
def test_a_life_of_seeds_is_that_of_one_process(name: str, found: Found) -> None:
    make, blueprint, blend = SHARDED_LIVES[name]
    one = result_of(make(), ranks.CONFIG, life(blueprint, blend))
    assert set(WHOLE_LIFE) <= set(one["stages"])
    assert (17, "UNDONE") in one["kinds"]
    assert ((13, "ROLLBACK") in one["kinds"]) == (name == "perceptron")
    # after bad numbers, one process also reports gradients by layer
    one["kinds"] = [kind for kind in one["kinds"] if kind[1] != "LAYER_GRADIENTS"]
    for rank in found[name]:
        assert_same_life(rank, one)
    assert [rank["decisions"] for rank in found[name]] == [one["decisions"], 0]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_seed_that_learns_blends_in_and_is_undone() -> None:
    def undone() -> Script:
        cull = Decision(op=Op.CULL, slot="early", reason="script")
        return Script(e1=germinate("early", "norm", "gated"), e6=cull)

    config = replace(ranks.CONFIG, max_epochs=7)
    found = result_of(tables(), replace(config, distributed=FSDP2), undone())
    expected = result_of(tables(), config, undone())
    assert (6, "UNDONE") in expected["kinds"]
    assert_same_life(found, expected)


@pytest.mark.slow
def test_strategies_continue_each_others_growth(found: Found) -> None:
    unbroken = result_of(texts(), ranks.CONFIG, life("lora"))
    for weights in found["grown"]:
        assert_same_weights(weights, unbroken["weights"], 1e-9)
    (directory,) = found["directory"]
    network = load_run(directory / "grown", task=texts())
    assert_same_weights(dict(network.state_dict()), unbroken["weights"], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_a_signal_stops_a_growing_network_on_all_ranks(name: str, found: Found) -> None:
    step, epoch = STOPS[name]
    for rank in found["stopped growing"]:
        assert rank[name] == {"signal": 15, "steps": step}
    (directory,) = found["directory"]
    written = (directory / name / CHECKPOINTS).glob("*.pt")
    assert [path.name for path in written] == [f"epoch-{epoch}.pt"]


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_by_name(found: Found) -> None:
    for criterion, scale, reading in found["refused"]:
        assert criterion.startswith("distributed.strategy 'fsdp2' needs cross entropy")
        assert "Scale has the parameter 'factor' without dimensions; give it" in scale
        assert "meta device, on which this host does not run" in reading


@pytest.mark.slow
def test_collectives_are_few(found: Found) -> None:
    epochs = 6
    steps = 5 * epochs
    learning = 5 * 3  # steps in which the seed made a pass of its own, through `mid` and the head
    blending = 5 * 1
    for counts in found["counted"]:
        # gradients of `early`, `mid` and the head, and of the seed
        assert counts["reduce_scatter_single"] == 3 * steps + learning + blending
        # the same blocks before forward and backward, and before each forward of an evaluation;
        # after an evaluation FSDP2 gathers one in vain
        evaluations = 3 * 2 + 6 * 3 + 6 + 4
        assert counts["all_gather_single"] == (
            2 * (3 * steps + 3 * learning + blending) + evaluations + (epochs - 1)
        )
        # a step: the weight of its rows. An epoch: statistics of gradients, those of a seed that
        # learns, the meter, whether to stop, the comparison of buffers; the test: the last two
        assert counts["all_reduce"] == steps + 4 * epochs + learning // 5 + 2
        # as with ddp
        assert counts["broadcast_object_list"] == 2 * epochs + 1
        assert counts["broadcast"] == 1 + 1 + epochs


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("linear_loss", {"train": TrainConfig(linear_loss=True)}),
        ("compile", {"train": TrainConfig(compile=CompileConfig(enabled=True))}),
        ("amp.dtype", {"train": TrainConfig(amp=AmpConfig(dtype="float16"))}),
        ("grad.every = 1", {"train": TrainConfig(grad=GradConfig(clip_norm=1.0, every=2))}),
        ("channels_last", {"channels_last": True}),
    ],
)
def test_settings_that_need_whole_parameters_are_refused(
    words: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"strategy 'fsdp2' needs .*{words}"):
        RunConfig(distributed=FSDP2, **changes)
