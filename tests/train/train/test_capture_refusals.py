"""Steps that cannot be captured are refused, and a failed capture leaves nothing behind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from esper_train import (
    CompileConfig,
    EpochResult,
    GradConfig,
    OptimizerRegistry,
    RunConfig,
    TrainConfig,
    build_train_step,
    train_one_epoch,
)
from esper_train.run.build import build_episode
from esper_train.train.batches import Batches
from esper_train.train.capture import WARM_UP, WARMING_UP
from tests.helpers.taped import (
    RATE,
    captured,
    data,
    network,
    sgd,
)


class Halving(SGD):
    """An optimizer that changes its rate in Python, which a graph would not repeat."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["lr"] /= 2


def epoch_of(config: TrainConfig, make: Callable[..., Any], **more: Any) -> EpochResult:
    model = network()
    batches = data(*[8] * 6)
    return train_one_epoch(
        model, batches, make(*model.parameters()), config, task_type="classification", **more
    )


def test_what_cannot_be_captured_is_refused_by_the_config() -> None:
    with pytest.raises(
        ValueError, match=r"train.capture does not go with train.compile.enabled; leave one"
    ):
        TrainConfig(capture=True, compile=CompileConfig(enabled=True))
    for every in (0, 2):
        with pytest.raises(
            ValueError, match=rf"train.capture .*clip_norm needs train.grad.every = 1, got {every}"
        ):
            TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0, every=every))


def test_a_criterion_of_ones_own_is_refused_and_torchs_is_not() -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError,
        match=r"no criterion but nn.CrossEntropyLoss, .*got <function .*leave train.capture",
    ):
        build_train_step("classification", config, nn.functional.cross_entropy)
    build_train_step("classification", config, nn.CrossEntropyLoss(label_smoothing=0.1))


def test_without_cuda_it_is_refused_before_anything_is_trained() -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"train.capture needs the model on a CUDA device, got cpu; leave"
    ):
        epoch_of(config, sgd)
    with pytest.raises(ValueError, match="needs the model on a CUDA device"):
        build_episode(RunConfig(task="synthetic", train=config), slots=())


@pytest.mark.parametrize(
    "make",
    [
        lambda *p: SGD(p, lr=RATE),
        lambda *p: AdamW(p, lr=RATE),
        lambda *p: SGD(p, lr=torch.tensor(RATE), fused=True),
        lambda *p: torch.optim.Adagrad(p, lr=RATE, fused=True),
        lambda *p: Halving(p, lr=RATE, fused=True),
    ],
)
def test_optimizers_that_need_the_host_are_refused(make: Callable[..., Optimizer]) -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"SGD, Adam or AdamW, made with fused=True.*got .*leave train.capture out"
    ):
        epoch_of(config, make, step=captured(config)[0])


def test_a_schedule_that_changes_more_than_the_rate_is_refused() -> None:
    def cycling(*parameters: Tensor) -> OptimizerRegistry:
        optimizers = OptimizerRegistry()
        optimizer = sgd(*parameters)
        optimizers.attach("host", optimizer, OneCycleLR(optimizer, RATE, 100))
        return optimizers

    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"a new learning rate .*and no other setting; .*cycle_momentum=False"
    ):
        epoch_of(config, cycling, step=captured(config)[0])


def test_an_error_of_the_capture_goes_through_and_leaves_nothing_half_captured() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step, tape = captured(config)
    optimizer = sgd(*model.parameters())

    def epoch() -> EpochResult:
        return train_one_epoch(
            model, data(*[8] * 5), optimizer, config, task_type="classification", step=step
        )

    tape.broken = True
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        epoch()
    assert optimizer.param_groups[0]["lr"] == RATE
    assert "capturable" not in optimizer.param_groups[0]
    tape.broken = False
    assert (epoch().not_replayed, epoch().not_replayed) == ({WARMING_UP: WARM_UP}, {})
    assert tape.records == 1


def test_after_an_epoch_that_failed_the_step_is_captured_again() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step, tape = captured(config)
    optimizer = sgd(*model.parameters())

    def failing() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(*[8] * 5)
        raise OSError("the disk is gone")

    def epoch(batches: Batches) -> EpochResult:
        return train_one_epoch(
            model, batches, optimizer, config, task_type="classification", step=step
        )

    epoch(data(*[8] * 5))
    with pytest.raises(OSError, match="the disk is gone"):
        epoch(failing())
    assert tape.records == 1
    assert epoch(data(*[8] * 5)).valid == 40
    assert tape.records == 2
