"""FSDP2: parameters that are divided among processes are trained as one process trains them."""

from dataclasses import replace
from typing import Any

import pytest

from esper_train import (
    AmpConfig,
    CompileConfig,
    GradConfig,
    RunConfig,
    TrainConfig,
    load_run,
)
from esper_train.run.directory import CHECKPOINTS
from tests.helpers.ranks import fitted, texts, together
from tests.helpers.sharded import CONFIG, FSDP2, SCENARIOS, SHARDED_FITS, all_scenarios
from tests.train.run.test_ranks import assert_same_measures, assert_same_weights

Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the two ranks found in each scenario, and the directory that they wrote to."""
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
def test_growing_and_criteria_of_ones_own_are_refused(found: Found) -> None:
    for growing, criterion in found["refused"]:
        assert growing.startswith("distributed.strategy 'fsdp2' trains networks without slots")
        assert criterion.startswith("distributed.strategy 'fsdp2' needs cross entropy")


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("linear_loss", {"train": TrainConfig(linear_loss=True)}),
        ("on_bad_numbers", {"train": TrainConfig(on_bad_numbers="rollback")}),
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
