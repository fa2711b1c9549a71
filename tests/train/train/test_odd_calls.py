"""Wrong arguments of `train_one_epoch` and `evaluate` are refused by name, and nothing is
trained."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_train import GradConfig, RunConfig, TrainConfig, evaluate, fit, train_one_epoch
from tests.helpers.linear import INPUTS, TARGETS, linear, sgd, train

GOOD = (INPUTS, TARGETS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", None),
        ("config", {"accumulate": 2}),
        ("config", RunConfig()),
        ("optimizers", None),
        ("optimizers", torch.optim.SGD),
        ("optimizer of the model's parameters", sgd(linear())),
        ("model", lambda x: x),
        ("epochs", "3"),
        ("epochs", 0),
        ("max_batches", 0),
        ("max_batches", -1),
        ("max_batches", 1.5),
        ("max_batches", "2"),
        ("max_batches", True),
        ("max_batches", math.nan),
        ("task type", None),
        ("task type", "regresion"),
        ("criterion", "mse"),
        ("criterion", nn.CrossEntropyLoss),
        ("criterion", lambda logits, targets: 1.0),
        ("criterion", lambda logits, targets: torch.tensor(1.0)),
        ("criterion", lambda logits, targets: (F.cross_entropy(logits, targets),)),
        ("criterion", lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")),
    ],
)
def test_an_argument_that_is_none_is_named(name: str, value: Any) -> None:
    model = linear()
    before = copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {
        "model": model,
        "config": TrainConfig(),
        "optimizers": sgd(model),
        "task_type": "classification",
    }
    arguments["optimizers" if name.startswith("optimizer") else name.replace(" ", "_")] = value
    call: Callable[..., object] = fit if name == "epochs" else train_one_epoch
    with pytest.raises((TypeError, ValueError), match=name):
        call(loader=[GOOD], **arguments)
    assert all(torch.equal(model.state_dict()[key], x) for key, x in before.items())


def test_samples_in_place_of_batches_are_told_apart_from_a_wrong_model() -> None:
    model = linear()
    samples = torch.utils.data.TensorDataset(*GOOD)
    with pytest.raises(ValueError, match=r"got \(3,\).*; if the loader is a Dataset of samples"):
        evaluate(model, samples, TrainConfig(), task_type="classification")  # type: ignore[arg-type]


class Returns(nn.Module):
    """A linear model whose output is put into something else."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear = linear()
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (lambda y: (None, y), "tuple"),
        (lambda y: {"scores": y}, "dict"),
        (lambda y: None, "None"),
        (lambda y: y.detach().numpy(), "ndarray"),
    ],
)
def test_an_output_that_is_no_tensor_is_named(wrap: Callable[[Tensor], object], named: str) -> None:
    model = Returns(wrap)
    for run in (train, lambda *a: evaluate(*a, TrainConfig(), task_type="classification")):
        with pytest.raises(TypeError, match=f"expected logits .* got .*{named}.* from the model"):
            run(model, [GOOD])


@pytest.mark.parametrize("batch", [..., False, (), 0, "ab"], ids=repr)
def test_an_odd_batch_does_not_end_the_epoch(batch: object) -> None:
    with pytest.raises(TypeError, match="expected batches"):
        train(linear(), [GOOD, batch, GOOD])


def test_a_loader_that_ends_by_an_error_does_not_end_the_epoch() -> None:
    def batches() -> Iterator[object]:
        yield GOOD
        raise StopIteration  # as `next` of an exhausted iterator does inside a generator

    with pytest.raises(RuntimeError, match="StopIteration"):
        train(linear(), batches())


def test_an_empty_batch_is_no_end_and_a_used_up_loader_no_epoch() -> None:
    empty = (INPUTS[:0], TARGETS[:0])
    result = train(linear(), [GOOD, empty, GOOD])
    assert (result.valid, result.batches) == (12, 3)
    used_up = iter([GOOD])
    train(linear(), used_up)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        train(linear(), used_up)


@pytest.mark.parametrize(
    "keep",
    [
        lambda y: y.untyped_storage(),
        lambda y: y.detach().numpy(),
        lambda y: memoryview(y.detach().numpy()),
        lambda y: torch.utils.dlpack.to_dlpack(y.detach()),
        lambda y: y[1:],
        lambda y: y.data,
        lambda y: y.view(-1),
        lambda y: lambda: y,
    ],
    ids=["storage", "numpy", "memoryview", "dlpack", "slice", "data", "view", "closure"],
)
def test_however_a_model_keeps_its_logits_they_stay(keep: Callable[[Tensor], object]) -> None:
    kept: list[object] = []
    logits: list[Tensor] = []

    def wrap(y: Tensor) -> Tensor:
        kept.append(keep(y))
        logits.append(y.detach().clone())
        return y

    model = Returns(wrap)
    train(model, [GOOD])
    found = as_tensor(kept[0])
    assert torch.equal(found, logits[0].flatten()[-len(found) :])


def as_tensor(kept: Any) -> Tensor:
    """The values, flat, of whatever was kept."""
    if isinstance(kept, torch.UntypedStorage):
        return torch.tensor([]).set_(kept).flatten()
    if callable(kept):
        kept = kept()
    if type(kept).__name__ == "PyCapsule":
        kept = torch.utils.dlpack.from_dlpack(kept)
    if isinstance(kept, memoryview):
        kept = np.asarray(kept)
    return torch.as_tensor(kept).detach().flatten()


@pytest.mark.parametrize(
    "last",
    [
        torch.exp,
        torch.sigmoid,
        torch.relu_,
        lambda y: y.log_softmax(-1),
        lambda y: (y.abs() + 1).sqrt(),
        lambda y: y.mean(0, keepdim=True).expand(6, 3),
        lambda y: (y.t() * 1).t(),
        lambda y: y.double(),
    ],
    ids=["exp", "sigmoid", "relu", "log_softmax", "sqrt", "expand", "transposed", "double"],
)
def test_any_last_operation_gets_torchs_gradient(last: Callable[[Tensor], Tensor]) -> None:
    """Many of them save their output for backward, which the gradient must not be written over."""
    ours, plain = Returns(last), Returns(last)
    train(ours, [GOOD])
    optimizer = sgd(plain)
    F.cross_entropy(plain(INPUTS), TARGETS).backward()
    optimizer.step()
    torch.testing.assert_close(ours.linear.weight, plain.linear.weight, rtol=1e-5, atol=1e-7)


class OfComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 3, dtype=torch.complex64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].abs().mean(1)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.EmbeddingBag(11, 3, mode="mean", sparse=True), OfComplexWeights],
    ids=["sparse", "complex"],
)
def test_gradients_that_have_no_statistics_say_so_and_train_without(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    batches = [(torch.randint(11, (6, 4)), torch.randint(3, (6,))) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"cannot be measured: .*, with train\.grad\.every = 0"):
        train(model, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    train(model, batches, TrainConfig(grad=GradConfig(every=0)))
    optimizer = sgd(plain)
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
