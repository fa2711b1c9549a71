"""Torch's names for the arguments: `input` and `target`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step

X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 6, 2, 3, 1])


def test_loss_by_either_name(config: KernelConfig) -> None:
    expected = F.cross_entropy(input=X, target=T)
    for loss in (
        cross_entropy(input=X, target=T, config=config),
        cross_entropy(target=T, input=X, config=config),
        cross_entropy(X, target=T, config=config),
        cross_entropy(logits=X, targets=T, config=config),
    ):
        torch.testing.assert_close(loss, expected)


def test_step_by_either_name(config: KernelConfig) -> None:
    meter = Meter("cpu")
    expected = cross_entropy_step(X, T, meter, config=config)
    for grad in (
        cross_entropy_step(input=X, target=T, meter=meter, config=config),
        cross_entropy_step(X, target=T, meter=meter, config=config),
    ):
        assert torch.equal(grad, expected)
    assert meter.compute().batches == 3


@pytest.mark.parametrize(
    ("positional", "named", "words"),
    [
        ((), {}, "expected logits, or input as torch names it, got neither"),
        ((X,), {}, "expected targets, or target as torch names it, got neither"),
        ((), {"input": X}, "expected targets, or target as torch names it, got neither"),
        ((), {"target": T}, "expected logits, or input as torch names it, got neither"),
        ((X, T), {"input": X}, "expected logits, or input as torch names it, got both"),
        ((X, T), {"target": T}, "expected targets, or target as torch names it, got both"),
        ((X,), {"input": X, "target": T}, "expected logits, or input .*got both"),
        ((X, None), {}, "expected targets, or target as torch names it, got neither"),
    ],
)
def test_none_or_both_are_refused(
    config: KernelConfig, positional: Any, named: dict[str, Any], words: str
) -> None:
    loss: Any = cross_entropy
    step: Any = cross_entropy_step
    for function in (loss, step):
        with pytest.raises(TypeError, match=words):
            function(*positional, **named, config=config)


@pytest.mark.best_instructions
def test_torchs_names_inside_compiled_graphs(config: KernelConfig) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: cross_entropy(input=x, target=t, config=config),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(X, T), F.cross_entropy(X, T))
    torch._dynamo.reset()
