"""Arguments of another type or out of their range: refused by name, with nothing written."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100, 1, 2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("meter", "accuracy"),
        ("meter", {"sums": torch.zeros(3)}),
        ("config", "eager"),
        ("config", {"backend": "eager"}),
        ("class_dim", True),
        ("class_dim", 0.0),
        ("ignore_index", 2**70),
        ("ignore_index", -100.0),
        ("z_loss", 10**400),
        ("normalizer", 10**400),
        ("softcap", 1e-50),
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
def test_clipping_to_what_is_no_norm_changes_no_gradient(
    config: KernelConfig, max_norm: Any
) -> None:
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


@pytest.mark.parametrize("topk", [(0,), (-1,), (True,), (1.0,), "5", (2**63,)])
def test_a_meter_counts_for_positive_integers_only(topk: Any) -> None:
    with pytest.raises(ValueError, match="topk"):
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
