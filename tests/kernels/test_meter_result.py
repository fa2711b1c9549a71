"""What `MeterResult` derives from its sums and counts."""

import math

import pytest
import torch

from esper_kernels import Meter, cross_entropy


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


def test_nothing_measured_is_nan() -> None:
    result = Meter("cpu", topk=(1, 5)).compute()
    assert math.isnan(result.perplexity)
    assert math.isnan(result.accuracy_at(5))
