"""`Tape` repeats what a step did, on which the tests of captured steps rely."""

import warnings

import pytest
import torch

from esper_train import TrainConfig, train_one_epoch
from esper_train.train.capture import Capture
from tests.helpers.taped import (
    Tape,
    captured,
    data,
    network,
    registry,
    sgd,
)


def test_a_tape_repeats_operations_alone_and_sees_what_the_host_reads() -> None:
    """The tests above would be worth nothing otherwise."""
    x = torch.zeros(2)
    calls = []

    def work() -> None:
        calls.append(x.add_(1).mul(2))

    replay = Tape().record(work)
    first = calls[0].clone()
    for _ in range(3):
        replay()
    assert (x.tolist(), first.tolist(), calls[0].tolist(), len(calls)) == (
        [3, 3],
        [2, 2],
        [6, 6],
        1,
    )
    with pytest.raises(AssertionError, match="the host reads"):
        Tape().record(lambda: print(x[0].item()))


def test_a_number_held_by_the_step_shows_in_a_tape() -> None:
    """The tests above are meaningful only if a rate that is not a tensor stays that of the
    capture."""
    config = TrainConfig(capture=True)
    found = []
    for rates in (Capture._rates_on_device, lambda self, **more: warnings.catch_warnings()):
        model = network()
        optimizers = registry(model, sgd)
        step, _ = captured(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Capture, "_rates_on_device", rates)
            train_one_epoch(
                model, data(*[8] * 8), optimizers, config, task_type="classification", step=step
            )
        found.append(model.state_dict()["1.weight"])
    assert not torch.equal(*found)
