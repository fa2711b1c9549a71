"""Derivatives and traces that bypass the autograd function are refused by name, never silently
wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, record_loss

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100])

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),)),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "hessian": lambda f: torch.func.hessian(f)(X),
    "vmap": lambda f: torch.vmap(f)(X[None]),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_by_name(config: KernelConfig, name: str) -> None:
    meter = Meter("cpu")
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: cross_entropy(x, T, meter=meter, config=config),
        lambda x: cross_entropy_step(x, T, meter, config=config).sum(),
    ]
    for function in functions:
        with pytest.raises(NotImplementedError, match=r"cross_entropy.* does not work inside"):
            TRANSFORMS[name](function)
    assert not meter.counts.any()


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_step])
def test_dual_tensors_are_refused(config: KernelConfig, function: Callable[..., Tensor]) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            function(dual, T, meter=None, config=config)
        function(X, T, meter=None, config=config)  # a plain tensor beside them is served


def test_torch_jit_trace_is_refused(config: KernelConfig) -> None:
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace"):
        torch.jit.trace(lambda x: cross_entropy(x, T, config=config), X)
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace"):
        torch.jit.trace(lambda x: cross_entropy_step(x, T, None, config=config), X)


def test_recording_a_loss_is_refused_too() -> None:
    meter = Meter("cpu")
    with pytest.raises(NotImplementedError, match="record_loss does not work inside"):
        torch.vmap(lambda x: record_loss(x.sum(), x, T, meter))(X[None])


def test_the_old_reverse_interface_is_right(config: KernelConfig) -> None:
    actual = torch.autograd.functional.vjp(
        lambda x: cross_entropy(x, T, config=config), X, torch.tensor(2.0)
    )
    expected = torch.autograd.functional.vjp(
        lambda x: torch.nn.functional.cross_entropy(x, T), X, torch.tensor(2.0)
    )
    torch.testing.assert_close(actual, expected)
