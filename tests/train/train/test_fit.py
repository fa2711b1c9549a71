"""The plain loop as others have it: epochs, callables after steps and epochs, refusals."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels.testing import SyncCounter
from esper_train import (
    CompileConfig,
    EpochEnd,
    NonFiniteLossError,
    OptimizerRegistry,
    StepEnd,
    TrainConfig,
    evaluate,
    fit,
    train_one_epoch,
)
from tests.helpers.classifier import CONFIG, batches, classifier, sgd
from tests.helpers.compilers import Counting


def test_fit_trains_and_validates_as_the_same_calls_by_hand() -> None:
    ours = classifier()
    plain = classifier()
    held_out = batches(seed=7)
    options: dict[str, Any] = {"task_type": "classification"}
    found = fit(ours, batches(), sgd(ours), CONFIG, epochs=3, validation=held_out, **options)
    optimizer = sgd(plain)
    for number, epoch in enumerate(found, start=1):
        trained = train_one_epoch(plain, batches(), optimizer, CONFIG, **options)
        measured = evaluate(plain, held_out, CONFIG, **options)
        assert epoch.number == number
        assert epoch.train.loss == trained.loss
        assert epoch.validation is not None
        assert epoch.validation.loss == measured.loss
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_without_validation_data_nothing_is_validated() -> None:
    model = classifier()
    (epoch,) = fit(model, batches(), sgd(model), CONFIG, task_type="classification", epochs=1)
    assert epoch.validation is None


def test_a_compiled_program_serves_all_epochs() -> None:
    torch._dynamo.reset()
    counting = Counting()
    config = TrainConfig(compile=CompileConfig(enabled=True, backend=counting))
    model = classifier()
    fit(model, batches(), sgd(model), config, task_type="classification", epochs=1)
    once = counting.graphs
    torch._dynamo.reset()
    fit(model, batches(), sgd(model), config, task_type="classification", epochs=4)
    assert counting.graphs == 2 * once > 0


def test_training_ends_where_on_epoch_returns_true_and_may_return_to_the_best_weights() -> None:
    """This is early stopping with the best weights, as in the example."""
    model = classifier()
    losses: list[float] = []
    best: dict[str, Any] = {}

    def on_epoch(end: EpochEnd) -> bool:
        assert end.validation is not None
        losses.append(end.validation.loss)
        if losses[-1] == min(losses):
            best.update(copy.deepcopy(model.state_dict()))
        return len(losses) - losses.index(min(losses)) > 2

    held_out = batches(seed=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    found = fit(
        model,
        batches(),
        optimizer,
        CONFIG,
        task_type="classification",
        epochs=50,
        validation=held_out,
        on_epoch=on_epoch,
    )
    assert 3 <= len(found) < 50
    model.load_state_dict(best)
    assert evaluate(model, held_out, CONFIG, task_type="classification").loss == min(losses)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_step_is_called_after_each_optimizer_step_and_reads_only_when_asked(
    accumulate: int,
) -> None:
    model = classifier()
    config = TrainConfig(accumulate=accumulate)
    seen: list[StepEnd] = []
    with SyncCounter() as quiet:
        train_one_epoch(
            model, batches(), sgd(model), config, task_type="classification", on_step=seen.append
        )
    assert quiet.count == 1  # at the end
    assert [end.number for end in seen] == list(range(1, 1 + math.ceil(3 / accumulate)))
    read: list[tuple[int, int]] = []

    def reads(end: StepEnd) -> None:
        measures = end.measures()
        read.append((measures.batches, measures.valid))

    with SyncCounter() as counter:
        train_one_epoch(
            model, batches(), sgd(model), config, task_type="classification", on_step=reads
        )
    assert read == ([(1, 8), (2, 16), (3, 19)] if accumulate == 1 else [(2, 16), (3, 19)])
    assert counter.count == 1 + len(read)


def test_epochs_below_one_are_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="epochs must be an int of at least 1, got 0"):
        fit(model, batches(), sgd(model), CONFIG, task_type="classification", epochs=0)


def test_a_loader_that_is_used_up_is_refused_with_a_way_out() -> None:
    model = classifier()
    loader = iter(batches())
    with pytest.raises(ValueError, match=r"no batch.*iterated anew, such as a DataLoader"):
        fit(model, loader, sgd(model), CONFIG, task_type="classification", epochs=2)


def unchanged(model: nn.Module, call: Callable[[], object], error: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error):
        call()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loop_without_gradients_is_refused(mode: Callable[[], Any]) -> None:
    model = classifier()
    with mode():
        unchanged(
            model,
            lambda: train_one_epoch(
                model, batches(), sgd(model), CONFIG, task_type="classification"
            ),
            r"expected gradients to be enabled, .*no_grad.*use evaluate",
        )


def test_a_model_whose_parameters_are_all_frozen_is_refused() -> None:
    model = classifier()
    optimizer = sgd(model)
    model.requires_grad_(False)
    unchanged(
        model,
        lambda: train_one_epoch(model, batches(), optimizer, CONFIG, task_type="classification"),
        "unfreeze a parameter",
    )


def test_frozen_layers_stay_as_they_are_and_the_others_learn_as_in_a_plain_loop() -> None:
    ours = classifier()
    plain = classifier()
    for model in (ours, plain):
        model.get_submodule("1").requires_grad_(False)
    result = train_one_epoch(ours, batches(), sgd(ours), CONFIG, task_type="classification")
    optimizer = sgd(plain)
    for inputs, targets in batches():
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        ours.get_submodule("1").state_dict(), classifier().get_submodule("1").state_dict()
    )
    assert result.grad is not None


class Twice(torch.optim.SGD):
    """A third-party optimizer that needs a closure."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda parameters: Twice(parameters, lr=0.1)])
def test_optimizers_that_need_a_closure_are_refused(make: Callable[[Any], Any]) -> None:
    model = classifier()
    name = "LBFGS" if make is torch.optim.LBFGS else "Twice"
    error = f"needs no closure, got {name}.*AdamW"
    optimizer = make(model.parameters())
    unchanged(
        model,
        lambda: train_one_epoch(model, batches(), optimizer, CONFIG, task_type="classification"),
        error,
    )
    with pytest.raises(ValueError, match=error):
        OptimizerRegistry(host=optimizer)


@pytest.mark.parametrize("call", [fit, train_one_epoch])
def test_data_with_nan_end_the_training_with_the_numbers(call: Callable[..., object]) -> None:
    data = batches()
    data[1][0][2, 0, 0] = math.nan
    model = classifier()
    more = {"epochs": 2} if call is fit else {}
    with pytest.raises(NonFiniteLossError, match="the training loss is nan") as raised:
        call(model, data, sgd(model), CONFIG, task_type="classification", **more)
    assert raised.value.result.nonfinite > 0
