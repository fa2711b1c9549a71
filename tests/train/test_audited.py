"""The audited module's names keep their meaning, with its defects gone."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esper_kernels import GradHealth
from esper_train.audited import (
    DualGradientStats,
    GradientHealthMetrics,
    SeedGradientCollector,
    collect_dual_gradients,
    collect_dual_gradients_async,
    collect_seed_gradients,
    collect_seed_gradients_async,
    compute_task_loss,
    compute_task_loss_with_metrics,
    materialize_dual_grad_stats,
    materialize_grad_stats,
)


def parameter(grad: torch.Tensor | None) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(1))
    p.grad = grad
    return p


def test_gradient_norm_is_the_l2_norm_over_all_tensors() -> None:
    """Four tensors of ones(4): sqrt(16) = 4; the audited collector divided by the number of
    tensors."""
    stats = collect_seed_gradients(iter([parameter(torch.ones(4)) for _ in range(4)]))
    assert stats == {
        "gradient_norm": 4.0,
        "gradient_health": 1.0,
        "has_vanishing": False,
        "has_exploding": False,
    }


def test_async_collection_materializes_to_the_same_numbers() -> None:
    parameters = [parameter(torch.full((3,), 200.0)), parameter(torch.zeros(2)), parameter(None)]
    direct = collect_seed_gradients(parameters)
    assert materialize_grad_stats(collect_seed_gradients_async(parameters)) == direct
    # one of two exploding, one of two vanishing: 1 - 0.8/2 - 0.5/2
    assert direct["gradient_health"] == pytest.approx(0.35)
    assert direct["has_vanishing"]
    assert direct["has_exploding"]


def test_enhanced_collection_has_every_number() -> None:
    health = collect_seed_gradients(
        [parameter(torch.tensor([3.0, 0.0])), parameter(torch.tensor([4.0]))], return_enhanced=True
    )
    assert not isinstance(health, dict)
    assert (health.gradient_norm, health.min_layer_norm, health.max_layer_norm) == (5.0, 3.0, 4.0)
    assert health.zero_grad_fraction == pytest.approx(1 / 3)


def test_nan_gradients_are_not_healthy() -> None:
    stats = collect_seed_gradients([parameter(torch.tensor([math.nan])), parameter(torch.ones(1))])
    assert stats["gradient_health"] == 0.0


def test_nothing_to_collect_is_neutral() -> None:
    expected = {
        "gradient_norm": 0.0,
        "gradient_health": 1.0,
        "has_vanishing": False,
        "has_exploding": False,
    }
    assert collect_seed_gradients([]) == collect_seed_gradients([parameter(None)]) == expected


def test_normalized_ratio_golden_value() -> None:
    """(0.5 / sqrt(100)) / (1 / sqrt(10000) + 1e-8) = 0.05 / 0.01000001."""
    assert DualGradientStats(1.0, 10_000, 0.5, 100).normalized_ratio == pytest.approx(
        4.999995, rel=1e-9
    )


@pytest.mark.parametrize(
    "stats", [(1e-9, 10, 1.0, 10), (1.0, 10, 1e-9, 10), (1.0, 0, 1.0, 10), (1.0, 10, 1.0, 0)]
)
def test_normalized_ratio_without_either_is_zero(stats: tuple[float, int, float, int]) -> None:
    assert DualGradientStats(*stats).normalized_ratio == 0.0


def test_dual_collection_keeps_host_and_seed_apart() -> None:
    host = [parameter(torch.full((4,), 2.0))]
    seed = [parameter(torch.full((9,), 1.0))]
    stats = materialize_dual_grad_stats(collect_dual_gradients_async(host, seed))
    assert stats == collect_dual_gradients(host, seed)
    assert stats._asdict() == {
        "host_grad_norm": 4.0,
        "host_param_count": 4,
        "seed_grad_norm": 3.0,
        "seed_param_count": 9,
    }


def test_the_collector_keeps_its_thresholds() -> None:
    parameters = [parameter(torch.full((4,), 2.0)), parameter(None)]
    collector = SeedGradientCollector(vanishing_threshold=5.0, exploding_threshold=10.0)
    stats = collector.collect(iter(parameters))
    assert stats == collect_seed_gradients(parameters, 5.0, 10.0)
    assert stats == materialize_grad_stats(collector.collect_async(parameters))
    assert stats["has_vanishing"]
    assert SeedGradientCollector() == (1e-7, 100.0)


HEALTHY = GradHealth(
    gradient_norm=1.0,
    gradient_health=1.0,
    has_vanishing=True,
    has_exploding=False,
    min_layer_norm=0.001,
    max_layer_norm=0.5,
    norm_ratio=500.0,
    zero_grad_fraction=0.25,
    nan_count=0,
    inf_count=0,
    tensors=2,
    elements=8,
)


@pytest.mark.parametrize(
    ("health", "healthy"),
    [
        (HEALTHY, True),
        (replace(HEALTHY, nan_count=1), False),
        (replace(HEALTHY, inf_count=1), False),
        (replace(HEALTHY, has_exploding=True), False),
        (replace(HEALTHY, norm_ratio=1000.0), False),
        (replace(HEALTHY, norm_ratio=math.nan), False),
        (replace(HEALTHY, zero_grad_fraction=0.5), False),
    ],
)
def test_health_has_the_audited_limits(health: GradientHealthMetrics, healthy: bool) -> None:
    assert health.is_healthy() is healthy
    assert not health.is_healthy(max_norm_ratio=500.0)
    assert not health.is_healthy(max_zero_fraction=0.25)


def test_health_as_a_dict_has_every_number() -> None:
    values = replace(HEALTHY, groups={"host": HEALTHY}).to_dict()
    assert values["groups"]["host"] == HEALTHY.to_dict()
    assert GradHealth(**HEALTHY.to_dict()) == HEALTHY
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    "criterion",
    [None, nn.CrossEntropyLoss(label_smoothing=0.1), lambda x, y: F.cross_entropy(x, y) * 2],
)
def test_task_loss_of_a_language_model_counts_its_tokens(criterion: object) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = logits.detach().argmax(-1)
    targets[0, 0] = (targets[0, 0] + 1) % 5
    targets[1, 1] = -100
    loss, correct, total = compute_task_loss_with_metrics(logits, targets, criterion, "lm")  # type: ignore[arg-type]
    plain = criterion or F.cross_entropy
    expected = plain(logits.flatten(0, 1), targets.flatten())  # type: ignore[operator]
    torch.testing.assert_close(loss, expected)
    assert (int(correct), int(total)) == (4, 5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    )


def test_task_loss_of_a_classifier() -> None:
    logits = torch.eye(3)
    targets = torch.tensor([0, 1, 0])
    torch.testing.assert_close(
        compute_task_loss(logits, targets, None, "classification"), F.cross_entropy(logits, targets)
    )


def test_task_loss_refuses_an_unknown_task_type() -> None:
    """A misspelt task type used to run as classification."""
    with pytest.raises(
        ValueError, match="unknown task type 'clasification'; perhaps 'classification'"
    ):
        compute_task_loss(torch.eye(2), torch.tensor([0, 1]), None, "clasification")
