"""Steps captured as graphs train and measure as eager ones do, bit for bit.

CUDA is not needed for it: `Tape` takes the place of a CUDA graph on the CPU.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from esper_kernels.testing import SyncCounter
from esper_train import (
    GradConfig,
    OptimizerRegistry,
    TrainConfig,
    build_train_step,
    train_one_epoch,
)
from esper_train.train.capture import OTHER_SHAPE, WARM_UP, WARMING_UP
from tests.helpers.scripted import not_a_number
from tests.helpers.taped import (
    MODES,
    RATE,
    SETTINGS,
    adamw,
    assert_same,
    captured,
    data,
    everything,
    measures,
    network,
    registry,
    sgd,
)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("setting", SETTINGS)
def test_replays_train_and_measure_as_eager_steps_do(
    setting: str, make: Callable[..., Optimizer]
) -> None:
    """Two epochs of whole batches and a ragged one; one is full of NaN where the setting leaves
    such a step out."""
    batches = data(*[8] * 16, 3)
    if setting in ("skip", "float16"):
        batches[12] = not_a_number(*batches[12])
    found = {}
    for capture in MODES:
        config = TrainConfig(capture=capture, **SETTINGS[setting])
        model = network()
        optimizers = registry(model, make)
        step = captured(config)[0] if capture else build_train_step("classification", config)
        results = [
            train_one_epoch(
                model, batches, optimizers, config, task_type="classification", step=step
            )
            for _ in range(2)
        ]
        state = everything(model, optimizers) | {"step": step.state_dict()}
        found[capture] = state, [measures(result) for result in results]
        if capture:
            warm = 2 * WARM_UP if setting == "every second" else WARM_UP
            steps = 8 if setting == "accumulated" else 16
            assert [r.replayed for r in results] == [steps - warm, steps]
            assert [r.not_replayed for r in results] == [
                {WARMING_UP: warm, OTHER_SHAPE: 1},
                {OTHER_SHAPE: 1},
            ]
    assert_same(found[True][0], found[False][0])
    assert repr(found[True][1]) == repr(found[False][1])  # NaN is NaN
    assert found[True][1][0]["skipped"] == (setting in ("skip", "float16"))


def test_gradients_at_the_end_are_those_of_the_last_step() -> None:
    """A replayed one after an eager one, and they stay where they are."""
    found = []
    batches = data(*[8] * 5, 3, 8, 8)
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        step = captured(config)[0] if capture else None
        optimizer = sgd(*model.parameters())
        for _ in range(2):
            before = [p.grad for p in model.parameters()]
            train_one_epoch(
                model, batches, optimizer, config, task_type="classification", step=step
            )
        found.append([p.grad for p in model.parameters()])
        assert not capture or all(p is q for p, q in zip(before, found[-1], strict=True))
    assert_same(*found)


def test_rates_between_the_float32_numbers_are_rounded() -> None:
    """A cosine's rates are not exact in float32: the same to its precision, and plain numbers
    outside of the step."""
    found = []
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        optimizer = sgd(*model.parameters())
        optimizers = OptimizerRegistry()
        optimizers.attach("host", optimizer, CosineAnnealingLR(optimizer, 12))
        step = captured(config)[0] if capture else None
        train_one_epoch(
            model, data(*[8] * 9), optimizers, config, task_type="classification", step=step
        )
        found.append(model.state_dict())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            RATE * (1 + math.cos(math.pi * 9 / 12)) / 2
        )
        assert "capturable" not in optimizer.param_groups[0]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[0]["1.weight"], network().state_dict()["1.weight"])


def test_the_host_waits_once_an_epoch() -> None:
    config = TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0))
    model = network()
    step = captured(config)[0]
    optimizer = sgd(*model.parameters())
    for replayed in (3, 6):
        with SyncCounter() as syncs:
            result = train_one_epoch(
                model, data(*[8] * 6, 3), optimizer, config, task_type="classification", step=step
            )
        assert (result.replayed, syncs.count) == (replayed, 1)
