"""A step that is skipped because its gradients are not finite changes no bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import Meter
from esper_train import TrainConfig, build_train_step, train_one_epoch
from tests.helpers.scripted import not_a_number


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 10),
    )


def data(*bad: int) -> list[tuple[Tensor, Tensor]]:
    """Five batches, of which those at the given places are not finite."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 4, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(5)
    ]
    return [not_a_number(*batch) if i in bad else batch for i, batch in enumerate(batches)]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def plain_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("optimizer", [sgd, plain_sgd, adamw])
@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 4)])
def test_a_skipped_step_changes_no_bit(optimizer: Any, bad: tuple[int, ...]) -> None:
    """Weights, running statistics and optimizer state after the epoch are those of an epoch without
    these batches."""
    skipping = TrainConfig(on_bad_numbers="skip")
    sparing = TrainConfig()
    models = network(), network()
    optimizers = [optimizer(model) for model in models]
    whole = train_one_epoch(
        models[0], data(*bad), optimizers[0], skipping, task_type="classification"
    )
    good = [batch for i, batch in enumerate(data()) if i not in bad]
    train_one_epoch(models[1], good, optimizers[1], sparing, task_type="classification")
    assert whole.skipped == len(bad)
    assert whole.nonfinite == 8 * len(bad)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    states = [list(o.state_dict()["state"].values()) for o in optimizers]
    assert len(states[0]) == len(states[1])
    for ours, theirs in zip(*states, strict=True):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert value is theirs[key] is None or torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_skipping_needs_no_further_sync(optimizer: Any) -> None:
    from esper_kernels.testing import SyncCounter

    model = network()
    with SyncCounter() as counter:
        result = train_one_epoch(
            model,
            data(1),
            optimizer(model),
            TrainConfig(on_bad_numbers="skip"),
            task_type="classification",
        )
    assert counter.count == 1
    assert result.skipped == 1


def test_an_optimizer_that_cannot_skip_is_refused() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"fused=True.*SGD.*on_bad_numbers"):
        train_one_epoch(
            model, data(), plain, TrainConfig(on_bad_numbers="skip"), task_type="classification"
        )
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_optimizer_restored_from_one_that_cannot_skip_is_refused() -> None:
    """A restored state can replace the setting with which the optimizer was made."""
    model = network()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    restored = sgd(model)
    restored.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="fused=True"):
        train_one_epoch(
            model, data(), restored, TrainConfig(on_bad_numbers="skip"), task_type="classification"
        )


def test_a_step_counts_bad_targets_apart_from_ignored_ones() -> None:
    meter = Meter("cpu")
    inputs, targets = data()[0]
    targets[:4] = torch.tensor([-100, 10, -1, -100])
    model = network()
    build_train_step("classification", TrainConfig(on_bad_numbers="warn"))(
        model, inputs, targets, meter
    )
    result = meter.compute(strict=False)
    assert (result.valid, result.ignored, result.bad_targets) == (4, 2, 2)
    assert targets[1] == 10  # the caller's settings are unchanged
    with pytest.raises(IndexError, match="10"):
        build_train_step("classification", TrainConfig())(model, inputs, targets, meter)
