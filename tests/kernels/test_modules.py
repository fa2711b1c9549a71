"""The module forms of the losses beside torch's own modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_kernels import CrossEntropyLoss, KernelConfig, LinearCrossEntropyLoss, Meter
from esper_kernels.testing import relative_error

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 2},
    {"label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 2.0, 7), "label_smoothing": 0.1},
]


def loss_and_gradient(module: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    loss = module(leaf, target)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (3, 7, 4), (2, 7, 3, 5), (2, 7, 0)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy_loss_is_that_of_torch(
    config: KernelConfig, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(7, rows, generator=generator)
    actual = loss_and_gradient(CrossEntropyLoss(**options, config=config), x, target)
    expected = loss_and_gradient(nn.CrossEntropyLoss(**options), x, target)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_channels_last_logits_and_the_meter(config: KernelConfig) -> None:
    x = torch.randn(2, 7, 3, 5).to(memory_format=torch.channels_last)
    target = x.argmax(1)
    meter = Meter("cpu")
    module = CrossEntropyLoss(z_loss=1e-2, softcap=9.0, meter=meter, config=config)
    module(x, target)
    assert meter.compute().correct[1] == 30


@pytest.mark.parametrize("options", [o for o in OPTIONS if "ignore_index" not in o], ids=str)
def test_probability_targets_are_served_by_torch(options: dict[str, Any]) -> None:
    x = torch.randn(3, 7, 4)
    target = torch.randn(3, 7, 4).softmax(1)
    actual = loss_and_gradient(CrossEntropyLoss(**options), x, target)
    torch.testing.assert_close(actual, loss_and_gradient(nn.CrossEntropyLoss(**options), x, target))


@pytest.mark.parametrize("more", [{"meter": Meter("cpu")}, {"z_loss": 0.1}, {"softcap": 5.0}])
def test_probability_targets_with_what_torch_has_not_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no meter, z_loss or softcap"):
        CrossEntropyLoss(**more)(torch.zeros(3, 7), torch.zeros(3, 7))


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has this module from 2.13 on"
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_cross_entropy_loss_is_that_of_torch(
    config: KernelConfig, bias: bool, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator)
    target = torch.randint(7, (6,), generator=generator)
    rival = nn.LinearCrossEntropyLoss(4, 7, bias=bias, **options)
    module = LinearCrossEntropyLoss(4, 7, bias=bias, **options, config=config)
    module.load_state_dict(rival.state_dict())
    actual = loss_and_gradient(module, x, target)
    torch.testing.assert_close(actual, loss_and_gradient(rival, x, target))


def test_linear_cross_entropy_loss_takes_leading_dimensions_and_a_meter(
    config: KernelConfig,
) -> None:
    meter = Meter("cpu")
    module = LinearCrossEntropyLoss(4, 7, bias=True, meter=meter, config=config)
    x = torch.randn(2, 3, 4)
    logits = module.linear(x)
    loss = module(x, logits.argmax(-1))
    assert meter.compute().correct[1] == 6
    truth = nn.CrossEntropyLoss()(logits.double().flatten(0, 1), logits.argmax(-1).flatten())
    assert relative_error(loss, truth) < 2e-6
