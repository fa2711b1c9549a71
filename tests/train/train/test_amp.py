"""Mixed precision: the loss scaler against torch's own, steps skipped on the device, no host sync
in the loop."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels.testing import SyncCounter
from esper_train import (
    AmpConfig,
    GradConfig,
    TrainConfig,
    build_train_step,
    evaluate,
    train_one_epoch,
)
from esper_train.train.amp import LossScaler

FLOAT16 = AmpConfig(dtype="float16", init_scale=2.0**20, growth_interval=4)
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]


def with_momentum_of_zero(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give torch's fused SGD the momentum that it should begin with: its own buffer is
    uninitialised when the first step is skipped."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group.get("momentum"):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float16_follows_torchs_grad_scaler(name: str) -> None:
    """The first scale overflows: both halve it, skip those steps, and double it after four good
    ones."""
    ours = classifier()
    plain = classifier()
    config = TrainConfig(amp=FLOAT16)
    step = build_train_step("classification", config)
    mine = OPTIMIZERS[name](ours.parameters())
    optimizer = with_momentum_of_zero(OPTIMIZERS[name](plain.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=FLOAT16.init_scale, growth_interval=4)
    assert step.scaler is not None
    scales = []
    for inputs, targets in batches(14):
        train_one_epoch(
            ours, [(inputs, targets)], mine, config, task_type="classification", step=step
        )
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits = plain(inputs)
        scaler.scale(F.cross_entropy(logits.float(), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert step.scaler.scale.item() == scales[-1]
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert scales[0] == FLOAT16.init_scale / 2  # the first step was skipped
    assert any(later > earlier for earlier, later in pairwise(scales))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_overflows_changes_nothing_but_the_scale(name: str) -> None:
    model = classifier()
    config = TrainConfig(amp=FLOAT16, grad=GradConfig(clip_norm=1.0))
    optimizer = OPTIMIZERS[name](model.parameters())
    step = build_train_step("classification", config)
    before = copy.deepcopy(model.state_dict())
    with SyncCounter() as counter:
        result = train_one_epoch(
            model, batches(1), optimizer, config, task_type="classification", step=step
        )
    assert counter.count == 1
    assert step.scaler is not None
    assert step.scaler.scale.item() == FLOAT16.init_scale / 2
    assert result.grad is not None
    assert result.grad.nan_count + result.grad.inf_count > 0
    assert result.skipped == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for state in optimizer.state.values():
        assert not any(bool(x.count_nonzero()) for x in state.values() if isinstance(x, Tensor))
    assert not hasattr(optimizer, "found_inf")  # the optimizer is its owner's again


@pytest.mark.parametrize("count", [1, 6])
def test_float16_syncs_once_an_epoch(count: int) -> None:
    model = classifier()
    config = TrainConfig(amp=FLOAT16)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with SyncCounter() as counter:
        train_one_epoch(model, batches(count), optimizer, config, task_type="classification")
    assert counter.count == 1


def test_statistics_and_clipping_are_of_the_unscaled_gradient() -> None:
    data = batches(1)
    norms = []
    for amp in (AmpConfig(), AmpConfig(dtype="float16", init_scale=1024.0)):
        model = classifier()
        config = TrainConfig(amp=amp, grad=GradConfig(clip_norm=0.01))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        result = train_one_epoch(model, data, optimizer, config, task_type="classification")
        assert result.grad is not None
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
        norms.append((result.grad.gradient_norm, moved.norm().item()))
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-2)
    assert [moved for _, moved in norms] == pytest.approx([0.01, 0.01], rel=1e-2)


def test_a_criterion_of_the_callers_own_is_scaled_too() -> None:
    def mean_log_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(logits.float().log_softmax(1), targets)

    config = TrainConfig(amp=AmpConfig(dtype="float16", init_scale=512.0))
    data = batches(5)
    models = [classifier(), classifier()]
    for model, criterion in zip(models, (None, mean_log_loss), strict=True):
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        train_one_epoch(
            model, data, optimizer, config, task_type="classification", criterion=criterion
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    ],
)
def test_float16_refuses_an_optimizer_that_cannot_skip(optimizer: Any) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"fused=True and without dampening, got (SGD|AdamW); .* no float16"
    ):
        train_one_epoch(
            model,
            batches(1),
            optimizer(model.parameters()),
            TrainConfig(amp=FLOAT16),
            task_type="classification",
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forward_runs_in_the_dtype_and_the_weights_stay_float32(dtype: str) -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    model = nn.Sequential(nn.Linear(6, 5), Watch())
    config = TrainConfig(amp=AmpConfig(dtype=dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    train_one_epoch(model, batches(1), optimizer, config, task_type="classification")
    evaluate(model, batches(1), config, task_type="classification")
    assert seen == [getattr(torch, dtype)] * 2
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_scaler_goes_on_where_its_state_left_off() -> None:
    found = torch.ones(())
    runs = [LossScaler(FLOAT16), LossScaler(FLOAT16)]
    for flag in (1.0, 0.0, 0.0):
        runs[0].update(found.fill_(flag))
    runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()))
    for scaler in runs:
        for _ in range(2):
            scaler.update(found.fill_(0.0))
    # halved, then four good steps
    assert [scaler.scale.item() for scaler in runs] == [2.0**20, 2.0**20]
