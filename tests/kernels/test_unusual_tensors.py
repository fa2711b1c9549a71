"""Views with a sign or conjugate bit, memory of the wrong size, and writes that torch refuses.

Long file: one table of inputs after the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    record_loss,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=GENERATOR)
T = torch.tensor([0, 1, 2, 3, 4, -100])


def negated(x: Tensor) -> Tensor:
    """x as a view whose memory holds -x: what `.conj().imag` gives."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def without_memory(x: Tensor) -> Tensor:
    """Zeros of the shape of x, as autograd keeps them."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


def misaligned(x: Tensor) -> Tensor:
    """A copy at an odd address."""
    memory = torch.zeros(x.nbytes + 1, dtype=torch.uint8)
    odd = torch.frombuffer(memory.numpy()[1:], dtype=x.dtype).view(x.shape)
    assert odd.data_ptr() % 2 == 1
    return odd.copy_(x)


# --- negative bits and tensors of zeros ---


@pytest.mark.parametrize(
    "name", ["logits", "weight", "label_smoothing", "z_loss", "normalizer", "grad_scale"]
)
def test_a_negative_bit_is_not_lost(config: KernelConfig, name: str) -> None:
    values = {
        "logits": X,
        "weight": torch.linspace(0.5, 2.0, 5),
        "label_smoothing": torch.tensor(0.2),
        "z_loss": torch.tensor(0.1),
        "normalizer": torch.tensor(3.0),
        "grad_scale": torch.tensor(7.0),
    }
    expected = cross_entropy_step(targets=T, meter=None, config=config, **values)
    values[name] = negated(values[name])
    actual = cross_entropy_step(targets=T, meter=None, config=config, **values)
    torch.testing.assert_close(actual, expected)


def test_a_negative_bit_of_grad_output_is_not_lost(config: KernelConfig) -> None:
    for reduction, shape in (("mean", ()), ("none", (6,))):
        grads = []
        for change in (torch.clone, negated):
            leaf = X.clone().requires_grad_()
            loss = cross_entropy(leaf, T, reduction=reduction, config=config)
            loss.backward(change(torch.full(shape, 0.5)))
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_gradients_with_a_negative_bit_are_measured(config: KernelConfig) -> None:
    stats = grad_stats([negated(X), X], inv_scale=negated(torch.tensor(2.0)), config=config)
    torch.testing.assert_close(stats.norms, 2 * X.double().norm().expand(2))


def test_tensors_of_zeros_without_memory_are_zeros(config: KernelConfig) -> None:
    zeros = torch._efficientzerotensor(X.shape)
    expected = cross_entropy_step(torch.zeros_like(X), T, None, config=config)
    assert torch.equal(cross_entropy_step(zeros, T, None, config=config), expected)
    targets = torch._efficientzerotensor(6, dtype=torch.int64)
    expected = cross_entropy_step(X, torch.zeros(6, dtype=torch.int64), None, config=config)
    assert torch.equal(cross_entropy_step(X, targets, None, config=config), expected)
    leaf = X.clone().requires_grad_()
    cross_entropy(leaf, T, config=config).backward(torch._efficientzerotensor(()))
    assert leaf.grad is not None
    assert not leaf.grad.any()


# --- freed and shrunk storage, odd addresses ---


@pytest.mark.parametrize("change", [freed, shrunk])
@pytest.mark.parametrize("name", ["logits", "targets", "weight", "out", "normalizer", "grad_scale"])
def test_missing_storage_is_refused_by_name(
    config: KernelConfig, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    meter = Meter("cpu")
    given: dict[str, Any] = {
        "logits": X,
        "targets": T,
        "weight": torch.ones(5),
        "out": torch.zeros(6, 5),
        "normalizer": torch.tensor(2.0),
        "grad_scale": torch.tensor(2.0),
    }
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"the storage of {name} holds .* bytes"):
        cross_entropy_step(meter=meter, config=config, **given)
    assert not meter.counts.any()


@pytest.mark.parametrize("change", [freed, shrunk])
def test_missing_storage_is_refused_by_every_function(
    config: KernelConfig, change: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ValueError, match="the storage of logits"):
        cross_entropy(change(X).requires_grad_(), T, config=config)
    with pytest.raises(ValueError, match="the storage of targets"):
        record_loss(torch.tensor(1.0), X, change(T), Meter("cpu"))
    if config.backend != "triton":
        with pytest.raises(ValueError, match=r"the storage of grads\[1\]"):
            grad_stats([X, change(X)], config=config)


def test_storage_freed_before_backward_is_refused(config: KernelConfig) -> None:
    leaf = X.clone().requires_grad_()
    logits = leaf * 1
    loss = cross_entropy(logits, T, config=config)
    logits.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match=r"storage"):
        loss.backward()


def test_odd_addresses_are_served(config: KernelConfig) -> None:
    expected = cross_entropy_step(X, T, None, weight=torch.linspace(0.5, 2.0, 5), config=config)
    actual = cross_entropy_step(
        misaligned(X),
        misaligned(T),
        None,
        weight=misaligned(torch.linspace(0.5, 2.0, 5)),
        out=misaligned(torch.zeros(6, 5)),
        config=config,
    )
    assert torch.equal(actual, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        stats, truth = (
            grad_stats([x], config=KernelConfig()) for x in (misaligned(X.to(dtype)), X.to(dtype))
        )
        assert torch.equal(stats.norms, truth.norms)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_large_out_at_an_odd_address(offset: int) -> None:
    """The gradient is larger than 16 MiB: it is stored past the caches in aligned pieces."""
    logits = torch.randn(130, 32768, generator=GENERATOR)
    targets = torch.randint(32768, (130,), generator=GENERATOR)
    memory = torch.zeros(logits.nbytes + 4, dtype=torch.uint8).numpy()[offset:]
    out = torch.frombuffer(memory, dtype=torch.float32, count=logits.numel()).view_as(logits)
    cross_entropy_step(logits, targets, None, out=out)
    assert torch.equal(out, cross_entropy_step(logits, targets, None))


# --- empty shapes ---


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (2, 5, 0), (0, 1), (3, 5, 0, 2)])
def test_empty_batches_with_classes_second(config: KernelConfig, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    meter = Meter("cpu")
    targets = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    losses = [
        cross_entropy(logits, targets, class_dim=1, reduction=reduction, meter=meter, config=config)
        for reduction in ("sum", "none", "mean")
    ]
    for loss, reduction in zip(losses, ("sum", "none", "mean"), strict=True):
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad.shape == logits.shape
    assert cross_entropy_step(logits.movedim(1, -1), targets, meter, config=config).numel() == 0
    assert (meter.compute().batches, meter.compute().valid) == (4, 0)


# --- accumulators and results of the wrong size ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sums", torch.zeros(2, dtype=torch.float64)),
        ("sums", torch.zeros(3)),
        ("sums", torch.zeros(6, dtype=torch.float64)[::2]),
        ("sums", freed(torch.zeros(3, dtype=torch.float64))),
        ("counts", torch.zeros(7, dtype=torch.int64)),
        ("counts", torch.zeros(9, dtype=torch.int64)),
        ("counts", torch.zeros(8, dtype=torch.int32)),
        ("counts", torch.zeros(8, dtype=torch.int64)[:1].expand(8)),
        ("counts", None),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_step])
def test_accumulators_of_the_wrong_size_are_refused(
    config: KernelConfig, function: Callable[..., Any], name: str, value: Any
) -> None:
    meter = Meter("cpu", topk=(1, 3))
    out = torch.full((6, 5), 7.0)
    setattr(meter, name, value)
    options = {"out": out} if function is cross_entropy_step else {}
    with pytest.raises(ValueError, match=f"meter.{name}"):
        function(X, T, meter=meter, config=config, **options)
    assert out.eq(7).all()


def test_topk_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError):
        Meter("cpu").topk = (1, 2, 3, 4)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["magnitudes", "counts", "total_norm", "found_inf"])
def test_grad_stats_out_of_the_wrong_size_is_refused(config: KernelConfig, name: str) -> None:
    fresh = grad_stats([X, X, X], config=config)
    value = getattr(fresh, name)
    for wrong in (value.new_empty(2), value.to(torch.int16), freed(value)):
        out = dataclasses.replace(fresh, **{name: wrong})
        with pytest.raises(ValueError, match=f"out.{name} (must|holds)|the storage of out.{name}"):
            grad_stats([X, X, X], out=out, config=config)


def test_a_mapping_of_tensors_has_groups_of_one(config: KernelConfig) -> None:
    health = grad_stats(
        {"w": X, "b": X[0], "none": None, "two": [X, X[1]]}, config=config
    ).compute()
    assert (health.tensors, health.elements) == (4, 70)
    assert {name: group.tensors for name, group in health.groups.items()} == {
        "w": 1,
        "b": 1,
        "none": 0,
        "two": 2,
    }
    assert health.groups["w"].gradient_norm == pytest.approx(X.norm().item())


# --- numbers ---


@pytest.mark.parametrize("normalizer", [-1.0, -2.5])
def test_a_negative_normalizer_does_not_mean_none(config: KernelConfig, normalizer: float) -> None:
    leaf = X.clone().requires_grad_()
    loss = cross_entropy(leaf, T, normalizer=torch.tensor(normalizer), config=config)
    loss.backward()
    expected = X.clone().requires_grad_()
    total = torch.nn.functional.cross_entropy(expected, T, reduction="sum") / normalizer
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(leaf.grad, expected.grad)


# --- writing in place ---


@pytest.mark.parametrize(
    "view",
    [
        lambda p: p,
        lambda p: p[:4],
        lambda p: p.view(-1, 5)[1:5],
        lambda p: p.detach().requires_grad_(),
    ],
)
def test_parameters_are_not_written_over(
    config: KernelConfig, view: Callable[[Tensor], Tensor]
) -> None:
    parameter = torch.nn.Parameter(X.clone())
    logits = view(parameter)
    with pytest.raises(ValueError, match="leaf that requires grad"):
        cross_entropy_step(logits, T[: len(logits)], None, inplace=True, config=config)
    assert torch.equal(parameter, X)


def test_parameters_are_not_written_over_under_no_grad(config: KernelConfig) -> None:
    parameter = torch.nn.Parameter(X.clone())
    with torch.no_grad(), pytest.raises(ValueError, match="leaf that requires grad"):
        cross_entropy_step(parameter[:4], T[:4], None, inplace=True, config=config)
    assert torch.equal(parameter, X)
    cross_entropy_step(parameter.detach()[:4], T[:4], None, inplace=True, config=config)
    assert not torch.equal(parameter, X)


@pytest.mark.parametrize("use", ["inplace", "out"])
def test_inference_tensors_are_not_written_over(config: KernelConfig, use: str) -> None:
    with torch.inference_mode():
        made = X.clone()
    options: dict[str, Any] = {"inplace": True} if use == "inplace" else {"out": made}
    logits = made if use == "inplace" else X
    with pytest.raises(ValueError, match="made in inference mode"):
        cross_entropy_step(logits, T, None, **options, config=config)
    assert torch.equal(made, X)
    with torch.inference_mode():
        cross_entropy_step(logits, T, None, **options, config=config)


@pytest.mark.parametrize("use", ["inplace", "out"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.zeros_like, ""),
        (negated, "negative of its values"),
        (without_memory, "without memory"),
    ],
)
def test_only_memory_that_holds_the_values_is_written_to(
    config: KernelConfig, use: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    memory = change(X)
    meter = Meter("cpu")
    options: dict[str, Any] = {"inplace": True} if use == "inplace" else {"out": memory}
    logits = memory if use == "inplace" else X
    if not words:
        assert cross_entropy_step(logits, T, meter, **options, config=config).any()
        return
    with pytest.raises(ValueError, match=words):
        cross_entropy_step(logits, T, meter, **options, config=config)
    assert not meter.counts.any()
    assert torch.equal(memory.clone(), change(X).clone())


# --- where the classes are ---


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 7), (2, 3, 4, 6), (3, 40, 2)])
def test_class_dim_1_is_torchs_layout(config: KernelConfig, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=GENERATOR, requires_grad=True)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=GENERATOR)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    (truth,) = torch.autograd.grad(expected, logits)
    loss = cross_entropy(logits, targets, class_dim=1, config=config)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, truth)
    step = cross_entropy_step(logits.detach(), targets, None, class_dim=1, config=config)
    torch.testing.assert_close(step, truth)
    out = torch.empty_like(
        logits.detach().movedim(1, -1), memory_format=torch.contiguous_format
    ).movedim(-1, 1)
    assert (
        cross_entropy_step(logits.detach(), targets, None, class_dim=1, out=out, config=config)
        is out
    )
    torch.testing.assert_close(out, truth)


@pytest.mark.parametrize(
    ("class_dim", "error"), [(2, ValueError), (-3, ValueError), (1.0, TypeError), (None, TypeError)]
)
def test_a_wrong_class_dim_is_refused(
    config: KernelConfig, class_dim: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="class_dim must be"):
        cross_entropy(X, T, class_dim=class_dim, config=config)
