"""Arguments of another type or out of their range: refused by name, with nothing written."""

import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import (
    GradStats,
    KernelConfig,
    Meter,
    clip_grad_norm_,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    record_loss,
    select_backend,
)
from esper_kernels.testing import relative_error

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100, 1, 2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("meter", "accuracy"),
        ("meter", {"sums": torch.zeros(3)}),
        ("config", "eager"),
        ("config", {"backend": "eager"}),
        ("class_dim", 2**70),
        ("ignore_index", 2**63),
        ("ignore_index", -(2**63) - 1),
        ("ignore_index", -100.0),
        ("z_loss", 10**400),
        ("normalizer", 10**400),
        ("softcap", 2.0**-101),
        ("softcap", 2.0**101),
        ("softcap", math.nan),
        ("label_smoothing", torch.tensor(0.1 + 1j)),
        ("z_loss", "0.1"),
        ("weight", [1.0] * 5),
        ("logits", X.tolist()),
        ("logits", torch.nested.nested_tensor([X, X])),
        ("logits", X.to_sparse()),
        ("targets", torch.ones(8, dtype=torch.bool)),
    ],
)
def test_cross_entropy_names_what_it_cannot_take(
    config: KernelConfig, name: str, value: object
) -> None:
    meter = Meter("cpu")
    arguments: dict[str, Any] = {"logits": X, "targets": T, "meter": meter, "config": config}
    for function in (cross_entropy, cross_entropy_step):
        with pytest.raises((TypeError, ValueError), match=name):
            function(**{**arguments, name: value})
    assert not meter.counts.any()


LOSS_NUMBERS = ("label_smoothing", "z_loss", "softcap", "normalizer")
NO_NUMBERS = (
    True,
    False,
    np.bool_(True),
    np.float32(0.5),
    np.int64(1),
    np.array(0.5),
    Decimal("0.5"),
    0.5 + 0j,
    "0.5",
    [0.5],
    torch.bool,
)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: f"{type(value).__name__} {value}")
def test_every_option_refuses_what_is_not_a_number(config: KernelConfig, value: object) -> None:
    """An op would convert some of these to numbers, and refuse others."""
    meter = Meter("cpu")
    calls: dict[str, list[Callable[..., object]]] = {
        name: [partial(cross_entropy, X, T, meter=meter), partial(cross_entropy_step, X, T, meter)]
        for name in (*LOSS_NUMBERS, "ignore_index", "class_dim")
    }
    calls["grad_scale"] = [partial(cross_entropy_step, X, T, meter)]
    calls["vanishing"] = calls["exploding"] = [partial(grad_stats, [X])]
    calls["max_norm"] = [partial(clip_grad_norm_, nn.Parameter(X))]
    for name, functions in calls.items():
        if isinstance(value, np.int64) and name == "class_dim":
            continue
        for function in functions:
            with pytest.raises(TypeError, match=rf"{name}.* must be an int"):
                function(**{name: value}, config=config)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        record_loss(torch.tensor(1.0), X, T, meter, ignore_index=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="topk must be"):
        Meter("cpu", topk=value)  # type: ignore[arg-type]
    assert not meter.counts.any()


@pytest.mark.parametrize("name", ["reduction", "backend", "instruction_set"])
@pytest.mark.parametrize("value", [True, 0, None, b"mean", ["mean"], {}])
def test_unknown_names_are_refused(config: KernelConfig, name: str, value: Any) -> None:
    def use() -> None:
        if name == "reduction":
            cross_entropy(X, T, reduction=value, config=config)
        else:
            KernelConfig(**{name: value})

    with pytest.raises(ValueError, match=f"{name} must be"):
        use()


@pytest.mark.parametrize("name", [*LOSS_NUMBERS, "grad_scale"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, -(10**400)])
def test_numbers_that_no_kernel_can_use_are_refused(
    config: KernelConfig, name: str, value: float
) -> None:
    if name == "grad_scale" and value == -math.inf:
        value = math.nan  # a scale may be any number
    with pytest.raises(ValueError, match=name):
        cross_entropy_step(X, T, None, **{name: value}, config=config)


@pytest.mark.parametrize("softcap", [2.0**-100, 1e-10, 1.0, 1e10, 1e20, 2.0**100])
def test_softcap_over_its_whole_range(config: KernelConfig, softcap: float) -> None:
    """Far outside of it, logit / softcap or its inverse would be flushed to 0 or overflow."""
    leaf = X.clone().requires_grad_()
    loss = cross_entropy(leaf, T, softcap=softcap, config=config)
    loss.backward()
    exact = X.double().requires_grad_()
    true_loss = F.cross_entropy(softcap * torch.tanh(exact / softcap), T)
    true_loss.backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert relative_error(loss, true_loss) < 1e-6
    assert relative_error(leaf.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_none_is_not_a_number(config: KernelConfig, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int or a float, got None"):
        cross_entropy(X, T, **{name: None}, config=config)


def test_floats_of_numpy_that_are_python_floats_are_numbers(config: KernelConfig) -> None:
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "normalizer": 3.0}
    numpy_numbers = {name: np.float64(number) for name, number in numbers.items()}
    found = cross_entropy_step(X, T, None, **numpy_numbers, grad_scale=np.float64(2), config=config)
    expected = cross_entropy_step(X, T, None, **numbers, grad_scale=2.0, config=config)
    assert torch.equal(found, expected)
    stats = grad_stats([X], vanishing=np.float64(0), exploding=np.float64(1), config=config)
    assert stats.compute().has_exploding


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vanishing", math.nan),
        ("vanishing", -1.0),
        ("exploding", "100"),
        ("exploding", True),
        ("inv_scale", 0.5),
        ("inv_scale", torch.tensor(2j)),
        ("inv_scale", torch.ones(1)),
        ("out", "mine"),
        ("config", "eager"),
    ],
)
def test_grad_stats_names_what_it_cannot_take(
    config: KernelConfig, name: str, value: object
) -> None:
    arguments: dict[str, Any] = {"grads": [X], "config": config}
    with pytest.raises((TypeError, ValueError), match=name):
        grad_stats(**{**arguments, name: value})


@pytest.mark.parametrize("max_norm", [math.nan, -1.0, "1", True, None])
def test_a_refused_max_norm_changes_no_gradient(config: KernelConfig, max_norm: Any) -> None:
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = X.clone()
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        clip_grad_norm_([parameter], max_norm, config=config)
    assert torch.equal(parameter.grad, X)


def test_clipping_to_infinity_or_zero_is_torchs(config: KernelConfig) -> None:
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = X.clone()
    clip_grad_norm_([parameter], math.inf, config=config)
    assert torch.equal(parameter.grad, X)
    clip_grad_norm_([parameter], 0, config=config)
    assert not parameter.grad.any()


@pytest.mark.parametrize("topk", [(0,), (-1,), (True,), (1.0,), "5", (2**63,), 5, {5}, None])
def test_a_meter_counts_for_positive_integers_only(topk: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="topk"):
        Meter("cpu", topk=topk)


@pytest.mark.parametrize(
    "damaged",
    [
        {"sums": torch.zeros(1, dtype=torch.float64)},  # broadcasts
        {"counts": torch.zeros(7)},  # would be truncated
        {"counts": torch.zeros(8, dtype=torch.int64)},
        {"sums": [0.0, 0.0, 0.0]},
    ],
)
def test_a_meter_takes_over_no_damaged_state(damaged: dict[str, object]) -> None:
    meter = Meter("cpu")
    cross_entropy(X, T, meter=meter)
    before = meter.compute()
    state = Meter("cpu").state_dict()
    with pytest.raises(ValueError, match=next(iter(damaged))):
        meter.load_state_dict({**state, **damaged})
    assert meter.compute() == before


def test_recording_without_a_meter_is_refused() -> None:
    with pytest.raises(TypeError, match="meter"):
        record_loss(torch.tensor(1.0), X, T, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config"):
        select_backend("cross_entropy", "cpu", torch.float32, "cpp")  # type: ignore[arg-type]


def memory_of(kind: str) -> tuple[Tensor, dict[str, Tensor], str]:
    """Memory for the gradient that holds an argument too, and that argument by name."""
    out = torch.full((8, 5), 0.5)
    if kind == "targets":
        targets = out.view(-1)[:16].view(torch.int64)
        targets.copy_(T)
        return out, {"targets": targets}, "targets"
    return out, {"weight": out[3]}, "weight"


@pytest.mark.parametrize("kind", ["targets", "weight"])
def test_memory_that_is_still_to_be_read_is_not_written_over(
    config: KernelConfig, kind: str
) -> None:
    out, argument, name = memory_of(kind)
    before = out.clone()
    with pytest.raises(ValueError, match=name):
        cross_entropy_step(X, **{"targets": T, "meter": None, **argument}, out=out, config=config)
    assert torch.equal(out.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda loss, x: torch.autograd.grad(
            loss, x, grad_outputs=torch.eye(8), is_grads_batched=True
        ),
        lambda loss, x: torch.func.vmap(lambda v: torch.autograd.grad(loss, x, v))(torch.eye(8)),
    ],
)
def test_batched_backward_passes_are_refused_by_name(
    config: KernelConfig, differentiate: Callable[[Tensor, Tensor], object]
) -> None:
    x = X.clone().requires_grad_()
    loss = cross_entropy(x, T, reduction="none", config=config)
    with pytest.raises(NotImplementedError, match="vmap"):
        differentiate(loss, x)


def test_out_of_statistics_is_a_result(config: KernelConfig) -> None:
    stats = grad_stats([X], config=config)
    assert isinstance(stats, GradStats)
    assert grad_stats([X], out=stats, config=config).counts is stats.counts
