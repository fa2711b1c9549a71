"""Four processes: single precision over 20 steps, and batch norm by part of the batch."""

import pytest
import torch
from torch import Tensor

from tests.helpers.four_ranks import WORLD, all_weights, images, single, weights
from tests.helpers.ranks import together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Weights]]:
    return together(WORLD, all_weights, tmp_path_factory.mktemp("four"))


def assert_all_are(found: list[Weights], expected: Weights, most: float) -> None:
    assert len(found) == WORLD
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value, rtol=most, atol=most, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_single_precision_over_20_steps(strategy: str, found: list[dict[str, Weights]]) -> None:
    expected = weights(single())
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert_all_are([rank[f"{strategy} single-table"] for rank in found], expected, 1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_batch_norm_is_that_of_each_part(strategy: str, found: list[dict[str, Weights]]) -> None:
    ranks = [rank[f"{strategy} double-images"] for rank in found]
    assert_all_are(ranks, weights(images(by_part=True)), 1e-9)
    of_whole_batches = weights(images(by_part=False))
    running = "host.segments.early.0.1.running_mean"
    assert not torch.allclose(ranks[0][running], of_whole_batches[running], rtol=1e-3)
