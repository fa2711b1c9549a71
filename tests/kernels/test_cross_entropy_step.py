"""`cross_entropy_step`: the gradient without a loss, its memory, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step
from esper_kernels.testing import (
    assert_no_worse_than_eager,
    cross_entropy_samples,
    plain_torch_cross_entropy,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 5, -100, 2])


def plain_grad(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(plain_torch_cross_entropy(leaf, targets, **options), leaf)
    return grad


@pytest.mark.in_turn
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)
def test_samples_agree_with_torch_in_float64(
    config: KernelConfig, device: str, logits_dtype: torch.dtype, reduction: str
) -> None:
    for name, logits, targets, options in cross_entropy_samples(logits_dtype, device):
        if (reduction == "sum" and "normalizer" in options) or logits.numel() == 0:
            continue
        weight = options.get("weight")
        options = {
            **options,
            "reduction": reduction,
            "weight": None if weight is None else weight.to(device),
        }
        grad = cross_entropy_step(logits, targets, None, **options, config=config)
        assert (grad.dtype, grad.shape, grad.requires_grad) == (
            logits_dtype,
            logits.shape,
            False,
        ), name
        truth = plain_grad(logits.double(), targets, **options)
        assert_no_worse_than_eager(grad, plain_grad(logits, targets, **options), truth)


def test_meter_sees_what_the_loss_would_show_it(config: KernelConfig) -> None:
    """normalizer, grad_scale and reduction change the gradient only."""
    meters = Meter("cpu"), Meter("cpu")
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "config": config}
    cross_entropy(X, T, meter=meters[0], **options)
    cross_entropy_step(X, T, meters[1], normalizer=7, grad_scale=3.0, **options)
    assert torch.equal(meters[0].sums, meters[1].sums)
    assert torch.equal(meters[0].counts, meters[1].counts)


@pytest.mark.parametrize("scale", [0.0, -2.0, 65536.0])
def test_grad_scale_multiplies(config: KernelConfig, scale: float) -> None:
    expected = scale * plain_grad(X, T)
    for value in (scale, torch.tensor(scale), torch.tensor(scale, dtype=torch.float64)):
        torch.testing.assert_close(
            cross_entropy_step(X, T, None, grad_scale=value, config=config), expected
        )


def test_grad_scale_is_applied_before_rounding_to_float16(config: KernelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(32, 1000, generator=generator) * 3).half()
    targets = torch.randint(1000, (32,), generator=generator)
    grad = cross_entropy_step(
        logits, targets, None, normalizer=512, grad_scale=65536.0, config=config
    )
    assert (grad != 0).double().mean() > 0.99
    late = plain_grad(logits, targets, normalizer=512)  # what a late scale would multiply
    assert (late != 0).double().mean() < 0.5
    assert relative_error(grad, plain_grad(logits.double(), targets, normalizer=512) * 65536) < 1e-3


def test_gradient_flows_through_backward(config: KernelConfig) -> None:
    weight = torch.eye(6, requires_grad=True)
    logits = X @ weight
    logits.backward(cross_entropy_step(logits, T, None, config=config))
    expected = torch.eye(6, requires_grad=True)
    torch.nn.functional.cross_entropy(X @ expected, T).backward()
    torch.testing.assert_close(weight.grad, expected.grad)


def test_out_is_written_and_returned(config: KernelConfig) -> None:
    out = torch.full((4, 16), torch.nan)[:, 3:9]  # class stride 1, rows apart
    version = out._version
    grad = cross_entropy_step(X, T, None, out=out, config=config)
    assert grad is out
    assert out._version > version
    torch.testing.assert_close(out, plain_grad(X, T))


def test_out_beside_the_logits_in_one_buffer_is_fine(config: KernelConfig) -> None:
    buffer = torch.zeros(2, 4, 6)
    buffer[0] = X
    cross_entropy_step(buffer[0], T, None, out=buffer[1], config=config)
    torch.testing.assert_close(buffer[1], plain_grad(X, T))
    assert torch.equal(buffer[0], X)


def test_inplace_writes_over_the_logits(config: KernelConfig) -> None:
    weight = torch.eye(6, requires_grad=True)
    logits = X @ weight
    grad = cross_entropy_step(logits, T, None, inplace=True, config=config)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad, plain_grad(X, T))
    logits.backward(grad)
    torch.testing.assert_close(weight.grad, X.t() @ plain_grad(X, T))


@pytest.mark.parametrize("use", ["inplace", "out"])
def test_autograd_raises_where_overwritten_values_are_needed(
    config: KernelConfig, use: str
) -> None:
    logits = X.clone().requires_grad_() * 1
    out = torch.ones(4, 6)
    needed = logits.square() if use == "inplace" else torch.ones(4, 6, requires_grad=True) * out
    options: dict[str, Any] = {"inplace": True} if use == "inplace" else {"out": out}
    cross_entropy_step(logits, T, None, **options, config=config)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()


def test_expanded_logits_are_read_without_harm(config: KernelConfig) -> None:
    logits = X[:1].expand(4, 6)
    torch.testing.assert_close(
        cross_entropy_step(logits, T, None, config=config), plain_grad(logits, T)
    )


BUFFER = torch.zeros(64)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(4, 5), "out must be like the logits.*got.*4, 5"),
        (torch.zeros(4, 6).half(), "float16"),
        (torch.zeros(4, 6, device="meta"), "meta"),
        (torch.zeros(4, 6, requires_grad=True), "not require grad"),
        ([[0.0]], "got list"),
        (torch.zeros(1, 6).expand(4, 6), "share memory"),
        (BUFFER.as_strided((4, 6), (2, 1)), "share memory"),
    ],
)
def test_wrong_out_is_refused(config: KernelConfig, out: Any, words: str) -> None:
    meter = Meter("cpu")
    with pytest.raises(ValueError, match=words):
        cross_entropy_step(X, T, meter, out=out, config=config)
    assert meter.counts.eq(0).all()


def test_out_overlapping_the_logits_is_refused(config: KernelConfig) -> None:
    buffer = torch.zeros(100)
    logits = buffer[:24].view(4, 6)
    for out in (logits, buffer[20:44].view(4, 6)):
        with pytest.raises(ValueError, match="out overlaps the logits"):
            cross_entropy_step(logits, T, None, out=out, config=config)
    cross_entropy_step(logits, T, None, out=buffer[24:48].view(4, 6), config=config)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(4, 6, requires_grad=True), "a leaf that requires grad"),
        (torch.zeros(1, 6).expand(4, 6), "share memory"),
        (BUFFER.as_strided((4, 6), (3, 1)), "share memory"),
    ],
)
def test_inplace_is_refused_where_it_would_do_harm(
    config: KernelConfig, logits: Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cross_entropy_step(logits, T, None, inplace=True, config=config)
    assert logits.eq(0).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reduction": "none"}, ValueError, "for 'none' use cross_entropy"),
        ({"out": torch.zeros(4, 6), "inplace": True}, ValueError, "got both"),
        ({"grad_scale": torch.ones(4)}, ValueError, "grad_scale as a tensor must be 0-d"),
        ({"grad_scale": torch.nan}, ValueError, "grad_scale"),
        ({"grad_scale": "1"}, TypeError, "grad_scale"),
    ],
)
def test_wrong_step_options_are_refused(
    config: KernelConfig, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        cross_entropy_step(X, T, None, **options, config=config)


def test_mean_over_nothing_has_zero_gradient(config: KernelConfig) -> None:
    targets = torch.full((4,), -100)
    assert cross_entropy_step(X, targets, None, config=config).eq(0).all()
    assert cross_entropy_step(X, T, None, normalizer=0, config=config).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["step", "inplace", "backward", "softcap"])
@pytest.mark.parametrize("v", [11, 3001])
def test_gradients_are_exactly_zero_in_the_same_places_on_every_backend(
    config: KernelConfig, form: str, v: int, dtype: torch.dtype
) -> None:
    """The gradient is 0 for -inf and for logits 86 or more below the largest. For larger logits, no
    gradient is 0 that is a normal float32 number."""
    below = torch.tensor([0.0, 1.0, 40.0, 85.0, 85.5, 86.0, 86.5, 87.0, 100.0, 150.0, torch.inf])
    rows = -below[torch.arange(v) % 11].roll(v // 2).expand(2, v).to(dtype)
    targets = rows.argmax(-1)
    options: dict[str, Any] = {"reduction": "sum", "config": config}
    if form == "backward":
        leaf = rows.clone().requires_grad_()
        cross_entropy(leaf, targets, **options).backward(torch.tensor(2.0**16))
        grad = leaf.grad
    else:
        if form == "softcap":
            options["softcap"] = 1e30  # more than any tanh can tell from none
        rows_given = rows.clone()
        inplace = form == "inplace"
        options |= {"grad_scale": 2.0**16, "inplace": inplace}
        grad = cross_entropy_step(rows_given, targets, None, **options)
    assert grad is not None
    assert torch.equal(grad == 0, rows <= -86)


def test_gradients_below_the_normal_numbers_are_zero_on_every_backend(config: KernelConfig) -> None:
    logits = torch.tensor([[0.0, -60.0, -80.0]])
    scale = 2.0**-20  # times exp(-80), 1.8e-35: 1.7e-41
    grad = cross_entropy_step(logits, torch.tensor([1]), None, grad_scale=scale, config=config)
    assert (grad == 0).tolist() == [[False, False, True]]
