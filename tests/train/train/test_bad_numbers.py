"""The loop's treatment of losses and gradients that are not finite."""

import math

import pytest
import torch

from esper_train import NonFiniteLossError, TrainConfig
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
