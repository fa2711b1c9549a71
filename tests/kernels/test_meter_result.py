"""Convenience of a meter and its result: accuracies, `to` and a repr."""

import math

import pytest
import torch

from esper_kernels import Meter, cross_entropy
from esper_kernels.testing import SyncCounter


def test_accuracy_at_k_divides_by_the_valid_rows() -> None:
    meter = Meter("cpu", topk=(2, 3))
    logits = torch.tensor([[3.0, 2.0, 1.0]]).expand(4, 3)
    cross_entropy(logits, torch.tensor([0, 1, 2, -100]), meter=meter)
    result = meter.compute()
    assert [result.accuracy_at(k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
    assert result.accuracy_at(1) == result.accuracy
    with pytest.raises(ValueError, match=r"one of \[1, 2, 3\].*got 5.*topk=\(1, 5\)"):
        result.accuracy_at(5)


@pytest.mark.parametrize(
    ("logit", "perplexity"), [(0.0, 2.0), (math.log(3), 4 / 3), (-2000.0, math.inf)]
)
def test_perplexity_is_the_exponential_of_the_loss(logit: float, perplexity: float) -> None:
    meter = Meter("cpu")
    cross_entropy(torch.tensor([[logit, 0.0]]), torch.tensor([0]), meter=meter)
    assert meter.compute().perplexity == pytest.approx(perplexity, rel=1e-6)


def test_perplexity_leaves_out_label_smoothing_where_the_likelihood_is_measured() -> None:
    meter = Meter("cpu", entropy=True)
    logits = torch.tensor([[math.log(3), 0.0]])
    cross_entropy(logits, torch.tensor([0]), meter=meter, label_smoothing=0.5)
    assert meter.compute().perplexity == pytest.approx(4 / 3, rel=1e-6)


def test_nothing_measured_is_nan() -> None:
    result = Meter("cpu", topk=(1, 5)).compute()
    assert math.isnan(result.accuracy_at(5))
    assert math.isnan(result.perplexity)


def test_repr_says_where_and_what_it_counts_without_a_sync() -> None:
    with SyncCounter() as syncs:
        assert repr(Meter("cpu", topk=(5,))) == "Meter(device='cpu', topk=(1, 5))"
        meter = Meter("cpu", per_class=3, entropy=True)
        assert repr(meter) == "Meter(device='cpu', topk=(1,), per_class=3, entropy=True)"
    assert syncs.count == 0


@pytest.mark.parametrize("inference", [False, True])
def test_a_meter_that_was_moved_counts_on(inference: bool) -> None:
    meter = Meter("cpu", topk=(1, 3))
    logits = torch.eye(4)
    cross_entropy(logits, torch.arange(4), meter=meter)
    before = meter.compute()
    with torch.inference_mode(inference):
        assert meter.to("cpu") is meter
    assert meter.compute() == before
    cross_entropy(logits, torch.arange(4), meter=meter)
    assert meter.compute().valid == 8


def test_to_moves_every_accumulator() -> None:
    meter = Meter("cpu").to("meta")
    assert {x.device.type for x in (meter.sums, meter.counts, meter.ticket)} == {"meta"}
    assert meter.device.type == "meta"


def test_a_device_without_float64_is_refused_and_nothing_moves() -> None:
    meter = Meter("cpu")
    with pytest.raises(ValueError, match="lacks"):
        meter.to("mps")
    assert meter.device.type == meter.sums.device.type == "cpu"
