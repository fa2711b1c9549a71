"""Four processes: a life of seeds, single precision over 20 steps, and batch norm by part of the
batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.four_ranks import LIFE, WORLD, all_runs, grown, images, single, weights
from tests.helpers.ranks import CONFIG, life, result_of, together
from tests.train.run.test_ranks import assert_same_life

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STRATEGIES = ("ddp", "fsdp2")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(WORLD, all_runs, tmp_path_factory.mktemp("four"))


def assert_all_are(found: list[Weights], expected: Weights, most: float) -> None:
    assert len(found) == WORLD
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value, rtol=most, atol=most, msg=name)


def test_a_life_of_seeds_is_that_of_one_process(found: list[dict[str, Any]]) -> None:
    one = result_of(LIFE(), CONFIG, life("bottleneck"))
    assert {(13, "ROLLBACK"), (17, "UNDONE")} <= set(one["kinds"])
    for rank in found:
        assert_same_life(rank["ddp"]["life"], one)
    one["kinds"] = [kind for kind in one["kinds"] if kind[1] != "LAYER_GRADIENTS"]
    for rank in found:
        assert_same_life(rank["fsdp2"]["life"], one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_single_precision_over_20_steps(strategy: str, found: list[dict[str, Any]]) -> None:
    expected = weights(single())
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert_all_are([rank[strategy]["fits"]["single-table"] for rank in found], expected, 1e-5)
    seeded = grown()
    assert any(name.startswith("seed_slots.early.seed.") for name in seeded)
    assert_all_are([rank[strategy]["grown"] for rank in found], seeded, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_norm_is_that_of_each_part(strategy: str, found: list[dict[str, Any]]) -> None:
    ranks = [rank[strategy]["fits"]["double-images"] for rank in found]
    assert_all_are(ranks, weights(images(by_part=True)), 1e-9)
    of_whole_batches = weights(images(by_part=False))
    running = "host.segments.early.0.1.running_mean"
    assert not torch.allclose(ranks[0][running], of_whole_batches[running], rtol=1e-3)
