"""Training and eval modes of modules are left as the user set them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper_train import TrainConfig, evaluate
from tests.helpers.linear import INPUTS, TARGETS, Normed, train


@pytest.mark.parametrize("frozen", [("norm",), ("drop",), ("norm", "drop", "out"), ()])
def test_modules_in_eval_mode_stay_in_it(frozen: tuple[str, ...]) -> None:
    model = Normed()
    for name in frozen:
        getattr(model, name).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    train(model, [(INPUTS + 5, TARGETS)])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.norm.running_mean, torch.zeros(4)) == ("norm" in frozen)  # type: ignore[arg-type]
    evaluate(model, [(INPUTS, TARGETS)], TrainConfig(), task_type="classification")
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_are_restored_when_measuring_fails() -> None:
    model = Normed()
    model.norm.eval()
    with pytest.raises(TypeError):
        evaluate(model, [None], TrainConfig(), task_type="classification")  # type: ignore[list-item]
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)


def test_a_model_in_eval_mode_is_trained_in_training_mode() -> None:
    model = Normed().eval()
    train(model, [(INPUTS + 5, TARGETS)])
    assert model.training
    assert not torch.equal(model.norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]


def test_modes_survive_an_interrupt_and_gradients_stay() -> None:
    class Interrupted(BaseException):
        pass

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield INPUTS, TARGETS
        raise Interrupted

    model = Normed()
    model.drop.eval()
    model.out.weight.grad = torch.ones(3, 4)
    with pytest.raises(Interrupted):
        evaluate(model, batches(), TrainConfig(), task_type="classification")
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert torch.equal(model.out.weight.grad, torch.ones(3, 4))


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Normed()
    model.out.bias.requires_grad_(False)
    before = model.out.bias.clone()
    train(model, [(INPUTS, TARGETS)])
    assert torch.equal(model.out.bias, before)
    assert not model.out.bias.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_where_autograd_is_off_is_refused(mode: type) -> None:
    with mode(), pytest.raises(ValueError, match=r"leave torch\.no_grad"):
        train(Normed(), [(INPUTS, TARGETS)])
