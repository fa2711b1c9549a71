"""Batches of a user's own loader, and data that a model or a loss writes over."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper_train import TrainConfig, evaluate, train_one_epoch
from esper_train.train.data import Loader
from esper_train.train.sources import LoaderSource
from tests.helpers.linear import INPUTS, TARGETS, linear, train


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (None, "got None"),
        (INPUTS, "got a Tensor"),
        ((INPUTS, TARGETS, TARGETS), r"got a tuple \(Tensor, Tensor, Tensor\)"),
        ((INPUTS, None), r"got a tuple \(Tensor, NoneType\)"),
        ({"x": INPUTS}, "got a dict"),
    ],
)
def test_a_batch_that_is_none_does_not_end_the_epoch(batch: object, named: str) -> None:
    good = (INPUTS, TARGETS)
    for run in (train, lambda *a: evaluate(*a, TrainConfig(), task_type="classification")):
        with pytest.raises(TypeError, match=named):
            run(linear(), [good, batch, good])


class Subtracts(nn.Module):
    """A model that writes over its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, alpha: object = None) -> Tensor:
        x -= 3
        return self.linear(x)


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_model_that_writes_over_its_input_leaves_the_data_alone(
    shuffled: bool, workers: int
) -> None:
    inputs = INPUTS.clone()
    targets = TARGETS.clone()
    shuffle = torch.Generator().manual_seed(0) if shuffled else None
    loader = Loader((inputs, targets), 4, shuffle=shuffle, workers=workers)
    losses = [
        evaluate(Subtracts(), loader, TrainConfig(), task_type="classification").loss
        for _ in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(inputs, INPUTS)
    assert losses[0] == pytest.approx(F.cross_entropy(Subtracts()(INPUTS.clone()), TARGETS).item())


def test_a_loss_that_writes_over_the_targets_leaves_the_data_alone() -> None:
    targets = TARGETS.clone()

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels.clone())
        labels.zero_()
        return loss

    train(linear(), Loader((INPUTS, targets), 4), criterion=criterion)
    assert torch.equal(targets, TARGETS)


def test_every_variant_is_measured_on_the_same_inputs() -> None:
    variants = {"one": {"slot": 0.0}, "two": {"slot": 1.0}}
    result = evaluate(
        Subtracts(),
        [(INPUTS.clone(), TARGETS)],
        TrainConfig(),
        task_type="classification",
        variants=variants,
    )
    assert {measured.loss for measured in result.variants.values()} == {result.loss}


@pytest.mark.parametrize(
    "make",
    [
        lambda inputs, targets: [(inputs, targets)],
        lambda inputs, targets: [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])],
        lambda inputs, targets: DataLoader(
            TensorDataset(inputs, targets), batch_size=None, sampler=[slice(0, 4), slice(4, 12)]
        ),
        lambda inputs, targets: DataLoader(range(2), collate_fn=lambda rows: (inputs, targets)),
        lambda inputs, targets: LoaderSource([(inputs, targets)]),
        lambda inputs, targets: [(torch.from_numpy(inputs.numpy()), targets)],
    ],
    ids=["list", "views", "slices", "collate_fn", "source", "numpy"],
)
def test_data_of_a_users_own_loader_is_left_alone_too(
    make: Callable[[Tensor, Tensor], Iterable[tuple[Tensor, Tensor]]],
) -> None:
    inputs = INPUTS.clone()
    targets = TARGETS.clone()
    loader = make(inputs, targets)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels.clone())
        labels.zero_()
        return loss

    model = Subtracts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(
        model, loader, optimizer, TrainConfig(), task_type="classification", criterion=criterion
    )
    evaluate(model, loader, TrainConfig(), task_type="classification")
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(targets, TARGETS)


def test_gradients_reach_inputs_that_ask_for_them() -> None:
    """Saliency needs this: the batch is a copy, and still the caller's own to autograd."""
    inputs = INPUTS.clone().requires_grad_()
    train(linear(), [(inputs, TARGETS)])
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0
