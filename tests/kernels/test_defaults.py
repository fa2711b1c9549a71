"""Default dtype and device of the process change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    Meter,
    clip_grad_norm_,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    info,
    record_loss,
)
from esper_kernels.info.check import check
from esper_kernels.testing import cross_entropy_samples, grad_samples

DTYPES = [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


@contextmanager
def other_defaults(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def same(ours: Any, theirs: Any) -> bool:
    """Whether structures of tensors and numbers are equal bit for bit."""
    if isinstance(ours, Tensor):
        a, b = (x.detach().reshape(-1).view(torch.uint8).numpy() for x in (ours, theirs))
        return (ours.dtype, ours.device) == (theirs.dtype, theirs.device) and np.array_equal(a, b)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return repr(ours) == repr(theirs)  # NaN equals NaN


def cross_entropies(config: KernelConfig) -> list[Any]:
    found: list[Any] = []
    for _, logits, targets, options in cross_entropy_samples():
        if logits.shape[-1] > 1000:  # slow in Triton's interpreter
            continue
        meter = Meter("cpu", topk=(2, 5))
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, meter=meter, config=config, **options)
        grad = None
        if logits.numel():
            (grad,) = torch.autograd.grad(loss, leaf)
        step = cross_entropy_step(logits, targets, meter, grad_scale=3.0, config=config, **options)
        record_loss(loss.detach(), logits, targets, meter)
        state = meter.state_dict()
        meter.load_state_dict(state)
        found += [loss, grad, step, meter.compute(), state["sums"], state["counts"]]
    return found


def statistics(config: KernelConfig) -> list[Any]:
    found: list[Any] = []
    for grads in grad_samples().values():
        stats = grad_stats(grads, config=config)
        found += [stats.norms, stats.max_abs, stats.counts, stats.total_norm, stats.found_inf]
        found += [stats.compute(), grad_stats({"all": grads}, out=stats, config=config).compute()]
        parameters = [x.detach().clone() for x in grads if x is not None and x.dim() > 0]
        for x in parameters:
            x.grad = x.clone()
        found += [clip_grad_norm_(parameters, 0.5, config=config), [x.grad for x in parameters]]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_is_the_same_under_other_defaults(
    config: KernelConfig, dtype: torch.dtype
) -> None:
    expected = cross_entropies(config)
    with other_defaults(dtype):
        found = cross_entropies(config)
    assert same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_the_same_under_other_defaults(
    config: KernelConfig, dtype: torch.dtype
) -> None:
    expected = statistics(config)
    with other_defaults(dtype):
        found = statistics(config)
    assert same(found, expected)


@pytest.mark.in_turn
@pytest.mark.best_instructions
def test_numbers_that_a_compiled_loss_makes_into_tensors_too(config: KernelConfig) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6) % 5

    def loss_of(number: float) -> Tensor:
        return cross_entropy(logits, targets, label_smoothing=number, softcap=9.0, config=config)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected = [compiled(number) for number in (0.1, 0.2)]
    torch._dynamo.reset()
    with other_defaults(torch.float64):
        found = [compiled(number) for number in (0.1, 0.2)]
    torch._dynamo.reset()
    assert same(found, expected)


def test_the_list_of_backends_and_their_comparison_too() -> None:
    expected = str(info())
    with other_defaults(torch.float64):
        assert str(info()) == expected
        line, agreed = next(check())
    assert agreed, line
