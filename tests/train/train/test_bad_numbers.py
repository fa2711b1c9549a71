"""The loop's treatment of losses and gradients that are not finite."""

import math

import pytest
import torch

from esper_train import NonFiniteLossError, TrainConfig, train_one_epoch
from tests.helpers.linear import INPUTS, TARGETS, linear, train


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stop_raises_without_a_run_and_brings_the_result(bad: float) -> None:
    with pytest.raises(NonFiniteLossError, match="training loss is nan") as raised:
        train(linear(), [(INPUTS, TARGETS), (INPUTS * bad, TARGETS)])
    result = raised.value.result
    assert (result.batches, result.valid, result.nonfinite) == (2, 12, 6)


def test_stop_raises_where_only_a_gradient_is_not_finite() -> None:
    model = linear()
    model.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFiniteLossError, match="12 gradient entries were NaN"):
        train(model, [(INPUTS, TARGETS)])


def test_an_epoch_without_a_valid_row_is_no_bad_number() -> None:
    result = train(linear(), [(INPUTS, torch.full_like(TARGETS, -100))])
    assert result.valid == 0
    assert math.isnan(result.loss)


def test_only_a_run_can_roll_back() -> None:
    with pytest.raises(ValueError, match="needs a run"):
        train(linear(), [(INPUTS, TARGETS)], TrainConfig(on_bad_numbers="rollback"))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("classes", "bad"), [(300, 0), (100, 2)])
def test_targets_in_bytes_are_what_they_say(classes: int, bad: int, accumulate: int) -> None:
    """In uint8, comparisons would read 300 as 44, and -100 as 156: a class of 300, none of 100."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, classes)
    inputs = torch.randn(3, 4)
    targets = torch.tensor([156, 44, 99], dtype=torch.uint8)
    config = TrainConfig(on_bad_numbers="warn", accumulate=accumulate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(inputs, targets)] * 2
    result = train_one_epoch(model, batches, optimizer, config, task_type="classification")
    valid = targets < classes if classes < 256 else torch.ones(3, dtype=torch.bool)
    logits = model(inputs[valid]).double()
    loss = torch.nn.functional.cross_entropy(logits, targets[valid].long())
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert (result.valid, result.bad_targets) == (6 - bad, bad)
