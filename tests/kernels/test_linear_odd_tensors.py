"""The ops of a linear layer and log-probabilities, on tensors whose memory does not hold their
values, or no longer, and under other defaults of the process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    linear_cross_entropy,
    linear_cross_entropy_step,
    linear_token_logprobs,
    token_logprobs,
)

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "hidden": torch.randn(6, 4, generator=GENERATOR),
    "weight": torch.randn(5, 4, generator=GENERATOR),
    "bias": torch.randn(5, generator=GENERATOR),
}
TARGETS = torch.tensor([0, 4, -100, 2, 3, 1])
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "expanded": lambda x: x[:1].expand(x.shape),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "one element on": lambda x: torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view_as(x),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "loss": lambda config, **x: linear_cross_entropy(
        **x, targets=TARGETS, reduction="none", config=config
    ),
    "logprobs": lambda config, **x: linear_token_logprobs(**x, targets=TARGETS, config=config),  # type: ignore[dict-item]
    "logprobs of logits": lambda config, hidden, weight, bias: token_logprobs(  # type: ignore[dict-item]
        F.linear(hidden, weight, bias), TARGETS, config=config
    ),
}


def expected(name: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight, bias), TARGETS, reduction="none")
    return losses if name == "loss" else -losses


def dense(x: Tensor) -> Tensor:
    """The same values in memory of their own."""
    return torch.zeros(x.shape) if x._is_zerotensor() else x.clone().resolve_neg()


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("argument", TENSORS)
@pytest.mark.parametrize("name", ["loss", "logprobs"])
def test_values_are_those_of_the_tensor_whatever_its_memory_holds(
    config: KernelConfig, name: str, argument: str, kind: str
) -> None:
    odd = TENSORS | {argument: ODD[kind](TENSORS[argument])}
    plain = {key: dense(x) for key, x in odd.items()}
    torch.testing.assert_close(FUNCTIONS[name](config, **odd), expected(name, **plain))
    if name == "loss":
        wanted = {key: x.detach().requires_grad_() for key, x in odd.items()}
        gradients = linear_cross_entropy_step(**wanted, targets=TARGETS, meter=None, config=config)
        leaves = {key: x.requires_grad_() for key, x in plain.items()}
        (expected(name, **leaves).sum() / 5).backward()
        for found, leaf in zip(gradients, leaves.values(), strict=True):
            assert found is not None
            torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_that_come_in_are_their_values(
    config: KernelConfig, name: str, kind: str
) -> None:
    incoming = ODD[kind](torch.rand(6, generator=torch.Generator().manual_seed(1)))
    found, plain = (
        {key: x.clone().requires_grad_() for key, x in TENSORS.items()} for _ in range(2)
    )
    FUNCTIONS[name](config, **found).backward(incoming)
    expected(name, **plain).backward(dense(incoming))
    for key, leaf in found.items():
        torch.testing.assert_close(leaf.grad, plain[key].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argument", TENSORS)
@pytest.mark.parametrize("name", ["loss", "logprobs"])
def test_memory_freed_before_backward_is_refused_by_name(
    config: KernelConfig, name: str, argument: str
) -> None:
    if config.backend == "triton":
        pytest.skip("Triton's interpreter reads through the arrays of numpy, which cannot shrink")
    leaves = {key: x.clone().requires_grad_() for key, x in TENSORS.items()}
    found = FUNCTIONS[name](config, **leaves)
    leaves[argument].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"the storage of {argument} holds 0 bytes"):
        found.sum().backward()


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_defaults_of_the_process_change_no_bit(
    config: KernelConfig, name: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    def results() -> list[Any]:
        leaves = {key: x.to(dtype, copy=True).requires_grad_() for key, x in TENSORS.items()}
        found = FUNCTIONS[name](config, **leaves)
        found.sum().backward()
        return [found.detach(), *(leaf.grad for leaf in leaves.values())]

    before = results()
    request.getfixturevalue("other_defaults")
    after = results()
    for ours, theirs in zip(after, before, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert ours.tolist() == theirs.tolist()
