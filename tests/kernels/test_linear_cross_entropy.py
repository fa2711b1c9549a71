"""Linear cross entropy against torch's own linear and cross entropy in float64, and its counts
against those of `cross_entropy` on the same logits.

Long file: one op against one truth, with shared cases.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_step,
)
from esper_kernels.ops.linear_cross_entropy import sizes
from esper_kernels.testing import (
    assert_no_worse_than_eager,
    plain_torch_cross_entropy,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 4.5},
    "normalizer as a tensor": {"normalizer": torch.tensor(7)},
    "class weights": {"weight": torch.linspace(0.5, 2.0, 61)},
    "ignored class": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "everything": {
        "weight": torch.linspace(0.5, 2.0, 61),
        "label_smoothing": torch.tensor(0.2),
        "z_loss": torch.tensor(1e-2),
        "softcap": 5.0,
        "reduction": "none",
    },
}


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor


def head(
    shape: tuple[int, ...] = (23,),
    classes: int = 61,
    width: int = 12,
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
    device: str = "cpu",
) -> Head:
    """Inputs that require grad, and targets of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    targets = torch.randint(classes, shape, generator=generator).to(device)
    targets.view(-1)[::5] = -100
    bias = leaf(classes) if with_bias else None
    return Head(leaf(*shape, width), leaf(classes, width), bias, targets)


def ours(x: Head, **options: Any) -> Tensor:
    if "weight" in options:
        options = {**options, "class_weight": options["weight"]}
        del options["weight"]
    return linear_cross_entropy(x.hidden, x.weight, x.targets, bias=x.bias, **options)


def plain(x: Head, **options: Any) -> Tensor:
    logits = F.linear(x.hidden, x.weight, x.bias)
    return plain_torch_cross_entropy(logits, x.targets, **options)


def gradients(function: Any, x: Head, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The loss, then the gradients of the leaves converted to dtype: times 2 for one loss, and
    times 0.5 to 2 for the losses of rows."""
    leaves = [None if y is None else y.detach().to(dtype).requires_grad_() for y in x[:3]]
    loss = function(Head(*leaves, x.targets), **options)  # type: ignore[arg-type]
    factors = torch.linspace(2.0, 0.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(factors.reshape(loss.shape))
    return [loss.detach(), *(y.grad for y in leaves if y is not None and y.grad is not None)]


def options_on(device: str, name: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches in several chunks and panels, the last of them ragged."""
    monkeypatch.setattr(sizes, "CPU_PANEL", 16)
    monkeypatch.setattr(sizes, "chunk_rows", lambda *arguments: 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)
def test_loss_and_gradients_agree_with_torch_in_float64(
    config: KernelConfig, device: str, logits_dtype: torch.dtype, name: str
) -> None:
    x = head(dtype=logits_dtype, device=device)
    options = options_on(device, name)
    if name == "ignored class":
        x = x._replace(targets=x.targets.clamp(min=0))
    actual = gradients(ours, x, logits_dtype, **options, config=config)
    truth = gradients(plain, x, torch.float64, **options)
    eager = gradients(plain, x, logits_dtype, **options)
    expected = torch.float64 if logits_dtype == torch.float64 else torch.float32
    assert actual[0].dtype == expected
    assert actual[0].shape == truth[0].shape
    assert relative_error(actual[0], truth[0]) <= max(2e-6, torch.finfo(logits_dtype).eps)
    for ours_, eager_, truth_ in zip(actual[1:], eager[1:], truth[1:], strict=True):
        assert_no_worse_than_eager(ours_, eager_, truth_)
    assert [grad.dtype for grad in actual[1:]] == [logits_dtype] * 3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", [n for n in OPTIONS if OPTIONS[n].get("reduction") != "none"])
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)
def test_step_gives_the_gradients_of_the_loss(
    config: KernelConfig, device: str, logits_dtype: torch.dtype, name: str
) -> None:
    x = head(dtype=logits_dtype, device=device)
    options = options_on(device, name)
    if name == "ignored class":
        x = x._replace(targets=x.targets.clamp(min=0))
    truth = gradients(plain, x, torch.float64, **options)
    eager = gradients(plain, x, logits_dtype, **options)
    options["class_weight"] = options.pop("weight", None)
    actual = linear_cross_entropy_step(
        x.hidden, x.weight, x.targets, None, bias=x.bias, grad_scale=2.0, **options, config=config
    )
    for ours_, eager_, truth_ in zip(actual, eager[1:], truth[1:], strict=True):
        assert ours_ is not None
        assert_no_worse_than_eager(ours_, eager_, truth_)  # gradients() has grad_output 2 as well


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(0,), (1,), (), (7,), (8,), (2, 0), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("classes", [1, 2, 16, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_awkward_sizes(
    config: KernelConfig, shape: tuple[int, ...], classes: int, with_bias: bool
) -> None:
    x = head(shape, classes, 3, with_bias=with_bias)
    truth = gradients(plain, x, torch.float64, reduction="sum")
    for actual, true in zip(
        gradients(ours, x, torch.float32, reduction="sum", config=config), truth, strict=True
    ):
        assert actual.shape == true.shape
        torch.testing.assert_close(actual.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_tensors_with_odd_strides(config: KernelConfig) -> None:
    x = head((6, 5), 40, 8)
    hidden = torch.randn(5, 8, 6).permute(2, 0, 1).requires_grad_()
    weight = torch.randn(8, 80).t()[::2].requires_grad_()
    targets = x.targets.t().contiguous().t()
    odd = Head(hidden, weight, x.bias, targets)
    truth = gradients(plain, odd, torch.float64)
    loss = ours(odd, config=config)
    loss.backward(torch.tensor(2.0))  # that of gradients()
    assert relative_error(loss, truth[0]) < 2e-6
    for leaf, true in zip((hidden, weight, x.bias), truth[1:], strict=True):
        assert leaf is not None
        assert leaf.grad is not None
        assert relative_error(leaf.grad, true) < 2e-6


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("form", ["loss", "no_grad", "step"])
@pytest.mark.parametrize("logits_dtype", DTYPES[:3], ids=str, indirect=True)
def test_meter_counts_as_cross_entropy_does(
    config: KernelConfig, logits_dtype: torch.dtype, form: str
) -> None:
    """All values are integers, so that products are exact and ties are frequent."""
    x = head(dtype=logits_dtype)
    assert x.bias is not None
    with torch.no_grad():
        for leaf in x[:3]:
            assert leaf is not None
            leaf.round_()
        x.hidden[3] = torch.nan
    meter, expected = Meter("cpu", topk=(2, 5, 100)), Meter("cpu", topk=(2, 5, 100))
    for targets in (x.targets, torch.full_like(x.targets, -100), x.targets[:9]):
        rows = x.hidden.detach()[: len(targets)]
        logits = F.linear(rows.float(), x.weight.float(), x.bias.float()).to(logits_dtype)
        cross_entropy(logits, targets, meter=expected, config=config)
        part = x._replace(hidden=x.hidden[: len(targets)], targets=targets)
        if form == "step":
            linear_cross_entropy_step(
                part.hidden, part.weight, targets, meter, bias=part.bias, config=config
            )
        else:
            with torch.set_grad_enabled(form == "loss"):
                ours(part, meter=meter, config=config)
    assert torch.equal(meter.counts, expected.counts)
    torch.testing.assert_close(meter.sums, expected.sums, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("logits_dtype", DTYPES[:3], ids=str, indirect=True)
@pytest.mark.parametrize("memory_dtype", [None, torch.float32])
def test_gradients_are_added_to_memory_that_is_given(
    config: KernelConfig, logits_dtype: torch.dtype, memory_dtype: torch.dtype | None
) -> None:
    x = head(dtype=logits_dtype)
    assert x.bias is not None
    fresh = linear_cross_entropy_step(*x[:2], x.targets, None, bias=x.bias, config=config)
    assert fresh.weight is not None
    assert fresh.bias is not None
    weight_grad = torch.ones_like(x.weight, dtype=memory_dtype, requires_grad=False)
    bias_grad = torch.ones_like(x.bias, dtype=memory_dtype, requires_grad=False)
    version = weight_grad._version
    given = linear_cross_entropy_step(
        *x[:2],
        x.targets,
        None,
        bias=x.bias,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        config=config,
    )
    assert given.weight is weight_grad
    assert given.bias is bias_grad
    assert weight_grad._version > version
    tolerance = torch.finfo(logits_dtype).eps
    torch.testing.assert_close(
        weight_grad - 1, fresh.weight, rtol=0, atol=2 * tolerance, check_dtype=False
    )
    torch.testing.assert_close(
        bias_grad - 1, fresh.bias, rtol=0, atol=2 * tolerance, check_dtype=False
    )
    assert torch.equal(given.hidden, fresh.hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("form", ["loss", "step"])
def test_what_is_frozen_gets_no_gradient(config: KernelConfig, frozen: str, form: str) -> None:
    x = head()
    whole = gradients(plain, x, torch.float64)[1:]
    place = ("hidden", "weight", "bias").index(frozen)
    x = x._replace(**{frozen: getattr(x, frozen).detach()})
    if form == "step":
        grads = list(
            linear_cross_entropy_step(
                *x[:2], x.targets, None, bias=x.bias, grad_scale=2.0, config=config
            )
        )
    else:
        ours(x, config=config).backward(torch.tensor(2.0))
        grads = [None if y is None else y.grad for y in x[:3]]
    assert grads[place] is None
    for i in {0, 1, 2} - {place}:
        grad = grads[i]
        assert grad is not None
        assert relative_error(grad, whole[i]) < 2e-6


def test_products_of_frozen_tensors_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are three products with every gradient, and one less for each that is frozen."""
    x = head(with_bias=False)
    for wanted in range(4):
        hidden = x.hidden.detach().requires_grad_(wanted % 2 == 1)
        weight = x.weight.detach().requires_grad_(wanted >= 2)
        with torch.profiler.profile() as profile:
            linear_cross_entropy_step(hidden, weight, x.targets, None)
        products = [e for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
        assert len(products) == 1 + wanted.bit_count()


def test_a_loss_scale_is_applied_before_rounding_to_float16(config: KernelConfig) -> None:
    """The gradients of the logits are so small that float16 rounds them to 0 unless they are scaled
    first."""
    x = head((16,), 400, 8, dtype=torch.float16, with_bias=False)
    truth = gradients(plain, x, torch.float64, normalizer=2.0**18)[2] / 2 * 2.0**16
    step = linear_cross_entropy_step(
        *x[:2], x.targets, None, normalizer=2.0**18, grad_scale=2.0**16, config=config
    )
    ours(x, normalizer=2.0**18, config=config).backward(torch.tensor(2.0**16))
    for grad in (step.weight, x.weight.grad):
        assert grad is not None
        assert relative_error(grad, truth) < 2e-3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_retain_graph_gives_the_same_gradients_twice(
    config: KernelConfig, dtype: torch.dtype
) -> None:
    x = head(dtype=dtype)
    loss = ours(x, config=config)
    leaves = [y for y in x[:3] if y is not None]
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_double_backward_raises(config: KernelConfig, dtype: torch.dtype) -> None:
    x = head(dtype=dtype)
    loss = ours(x, config=config)
    (grad,) = torch.autograd.grad(loss, x.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        grad.square().sum().backward()


def test_mean_over_nothing_is_nan_with_zero_gradients(config: KernelConfig) -> None:
    x = head()
    x.targets.fill_(-100)
    loss = ours(x, config=config)
    loss.backward()
    assert loss.isnan()
    for leaf in x[:3]:
        assert leaf is not None
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_without_grad_only_the_loss_is_computed(config: KernelConfig) -> None:
    x = head()
    expected = ours(x, config=config)
    with torch.no_grad():
        loss = ours(x, config=config)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_autocast_decides_the_dtype_of_the_logits(config: KernelConfig) -> None:
    """Parameters stay float32, and so do their gradients."""
    if config.backend == "triton":
        pytest.skip("Triton's interpreter loses carries when it rounds to bfloat16")
    x = head()
    assert x.bias is not None
    low = Head(*(y.detach().bfloat16() for y in x[:3] if y is not None), x.targets)
    truth = gradients(plain, low, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, config=config)
        step = linear_cross_entropy_step(
            x.hidden.bfloat16(), x.weight, x.targets, None, bias=x.bias, config=config
        )
    loss.backward(torch.tensor(2.0))
    assert relative_error(loss, truth[0]) < 1e-2
    assert x.weight.grad is not None
    assert relative_error(x.weight.grad, truth[2]) < 1e-2
    assert step.weight is not None
    assert step.weight.dtype == torch.float32
    assert relative_error(step.weight, truth[2] / 2) < 1e-2
