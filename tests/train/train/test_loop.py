"""`train_one_epoch` against the same training written out by hand in plain torch."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import KernelConfig
from esper_kernels.testing import SyncCounter
from esper_train import (
    GradConfig,
    HostConfig,
    OptimizerRegistry,
    TrainConfig,
    evaluate,
    train_one_epoch,
)
from esper_train.tasks import get_task, load_splits
from esper_train.train.batches import Batches
from tests.helpers.classifier import CONFIG, LanguageModel, batches, classifier, sgd


def test_train_one_epoch_trains_and_measures_as_plain_torch_does() -> None:
    data = batches()
    ours = classifier()
    plain = classifier()
    result = train_one_epoch(ours, data, sgd(ours), CONFIG, task_type="classification")

    optimizer = sgd(plain)
    losses = []
    correct = 0
    for inputs, targets in data:
        optimizer.zero_grad()
        logits = plain(inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(targets)))
        correct += int((logits.argmax(1) == targets).sum())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # a row's mean
    assert result.loss == pytest.approx(sum(loss * n for loss, n in losses) / 19, rel=1e-6)
    assert result.mean_batch_loss == pytest.approx(sum(loss for loss, _ in losses) / 3, rel=1e-6)
    assert result.accuracy == correct / 19
    assert (result.correct, result.valid, result.batches, result.nonfinite) == (
        {1: correct},
        19,
        3,
        0,
    )
    assert not result.compiled
    assert result.backend == "cpp"


def test_digits_are_learned_alike_by_the_compiled_kernels_and_by_torch() -> None:
    curves: list[list[float]] = []
    for backend in ("cpp", "eager"):
        config = TrainConfig(kernel=KernelConfig(backend=backend))
        task = get_task("digits")
        splits = load_splits(task)
        torch.manual_seed(0)
        model = task.build_host(HostConfig())
        optimizer = sgd(model)
        data = list(zip(*(part.split(64) for part in splits.train), strict=True))
        curves.append([])
        for _ in range(3):
            result = train_one_epoch(model, data, optimizer, config, task_type="classification")
            held_out = evaluate(model, [splits.validation], config, task_type="classification")
            assert result.grad is not None
            assert (result.backend, held_out.backend) == (backend, backend)
            curves[-1] += [result.loss, result.grad.gradient_norm, held_out.loss]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][6] < curves[0][0] / 2  # it learned


def test_language_model_training_equals_plain_torch() -> None:
    tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(3))
    ours = LanguageModel()
    plain = LanguageModel()
    result = train_one_epoch(
        ours, [(tokens[:, :-1], tokens[:, 1:])], sgd(ours), CONFIG, task_type="lm"
    )
    optimizer = sgd(plain)
    F.cross_entropy(plain(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.valid == 20


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("every", [0, 1])
def test_train_one_epoch_syncs_once_however_many_batches(count: int, every: int) -> None:
    model = classifier()
    config = TrainConfig(grad=GradConfig(every=every, clip_norm=1.0))
    with SyncCounter() as counter:
        train_one_epoch(
            model, batches((4,) * count), sgd(model), config, task_type="classification"
        )
    assert counter.count == 1


def test_the_sync_counter_sees_a_sync() -> None:
    """The tests above are meaningful only if this holds."""
    with SyncCounter() as counter:
        torch.ones(()).item()
        torch.ones(2).tolist()
        bool(torch.ones(()))
    assert counter.count == 3


def test_max_batches_limits_and_zero_is_an_error() -> None:
    model = classifier()
    assert (
        train_one_epoch(
            model, batches(), sgd(model), CONFIG, task_type="classification", max_batches=2
        ).batches
        == 2
    )
    assert (
        evaluate(model, batches(), CONFIG, task_type="classification", max_batches=7).batches == 3
    )
    with pytest.raises(ValueError, match=r"max_batches must be at least 1.*got 0"):
        evaluate(model, batches(), CONFIG, task_type="classification", max_batches=0)


def test_max_batches_draws_no_further_batch() -> None:
    def source() -> Batches:
        yield from batches((4, 4))
        raise AssertionError("a third batch was drawn")

    assert (
        evaluate(classifier(), source(), CONFIG, task_type="classification", max_batches=2).batches
        == 2
    )


@pytest.mark.parametrize("call", [train_one_epoch, evaluate])
def test_empty_loader_is_refused(call: Callable[..., object]) -> None:
    model = classifier()
    arguments = (sgd(model),) if call is train_one_epoch else ()
    with pytest.raises(ValueError, match="no batch"):
        call(model, [], *arguments, CONFIG, task_type="classification")


def test_bad_target_names_row_and_value_and_changes_nothing() -> None:
    model = classifier()
    before = [p.clone() for p in model.parameters()]
    data = [(torch.zeros(3, 2, 3), torch.tensor([0, 9, 1]))]
    with pytest.raises(IndexError, match=r"target 9 of row \(1,\)"):
        train_one_epoch(model, data, sgd(model), CONFIG, task_type="classification")
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        evaluate(nn.Flatten(), batches(), CONFIG, task_type="classification")


def test_grad_is_the_last_measured_batch_by_group() -> None:
    """The third of 4 batches is measured last with every=2; norms from plain torch on the same
    weights."""
    ours = classifier()
    plain = classifier()
    first = ours[1]
    second = ours[3]
    registry = OptimizerRegistry(host=sgd(first), early=sgd(second))
    data = batches((4, 4, 4, 4))
    result = train_one_epoch(
        ours, data, registry, TrainConfig(grad=GradConfig(every=2)), task_type="classification"
    )
    optimizer = sgd(plain)
    for inputs, targets in data[:3]:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        norms = [p.grad.double().norm().item() for p in plain.parameters() if p.grad is not None]
        optimizer.step()
    assert result.grad is not None
    assert result.grad.groups["host"].gradient_norm == pytest.approx(
        math.hypot(*norms[:2]), rel=1e-5
    )
    assert result.grad.groups["early"].gradient_norm == pytest.approx(
        math.hypot(*norms[2:]), rel=1e-5
    )
    assert result.grad.gradient_norm == pytest.approx(math.hypot(*norms), rel=1e-5)
    assert result.grad.groups["host"].elements == 6 * 8 + 8


def test_grad_is_none_when_never_measured() -> None:
    model = classifier()
    config = TrainConfig(grad=GradConfig(every=0))
    assert (
        train_one_epoch(model, batches(), sgd(model), config, task_type="classification").grad
        is None
    )


def test_nonfinite_gradients_are_summed_over_the_epoch() -> None:
    """NaN in the first of three batches only: the last batch is clean, the epoch's count is not."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return torch.full_like(grad, math.nan)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.inner(x.flatten(1))
            return Spoil.apply(y) if self.calls == 1 else y

    class Still(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            """Keep the weights clean of the NaN."""

    model = Model()
    optimizer = Still(model.parameters(), lr=0.1)
    result = train_one_epoch(
        model,
        batches(),
        optimizer,
        replace(CONFIG, on_bad_numbers="warn"),
        task_type="classification",
    )
    assert result.grad is not None
    assert result.grad.nan_count == 6 * 5 + 5
    assert result.grad.inf_count == 0
    assert result.grad.gradient_health == 0.0
    assert math.isfinite(result.grad.gradient_norm)


def test_clipping_uses_the_total_norm_over_groups() -> None:
    ours = classifier()
    plain = classifier()
    registry = OptimizerRegistry(host=sgd(ours[1]), early=sgd(ours[3]))
    data = batches((8, 8))
    train_one_epoch(
        ours,
        data,
        registry,
        TrainConfig(grad=GradConfig(clip_norm=0.05)),
        task_type="classification",
    )
    optimizer = sgd(plain)
    for inputs, targets in data:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05  # it clips
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
