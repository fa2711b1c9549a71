"""Settings of a wrong type, or NaN, are refused when they are made."""

import math
from collections.abc import Callable

import pytest

from esper_train import (
    CompileConfig,
    GovernorConfig,
    GradConfig,
    HeuristicConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GradConfig(vanishing=math.nan),
            r"train\.grad\.vanishing must be at least 0 and finite, got nan",
        ),
        (
            lambda: HeuristicConfig(plateau_threshold=math.nan),
            "plateau_threshold must be a finite number, got nan",
        ),
        (lambda: GovernorConfig(sensitivity=math.nan), "sensitivity must be at least 0"),
        (lambda: OptimConfig(host_lr=math.nan), "host_lr must be positive and finite"),
    ],
)
def test_nan_is_no_setting(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RunConfig(optim={"host_lr": 0.1}),
            "optim takes OptimConfig, got {'host_lr': 0.1}",
        ),
        (lambda: RunConfig(max_epochs="60"), "max_epochs takes int, got '60'"),
        (lambda: RunConfig(batch_size=8.0), r"batch_size takes int, got 8\.0"),
        (lambda: RunConfig(max_epochs=True), "max_epochs takes int, got True"),
        (lambda: RunConfig(slots="early"), "slots takes a tuple of str, got 'early'"),
        (lambda: RunConfig(slots=("early", 2)), "slots takes a tuple of str"),
        (lambda: TrainConfig(topk=(1, 2.5)), "topk takes a tuple of int"),
        (lambda: TrainConfig(kernel="cpp"), "kernel takes KernelConfig, got 'cpp'"),
        (lambda: CompileConfig(backend=3), "backend takes str or a callable, got 3"),
        (lambda: OptimConfig(host_lr="0.1"), "host_lr takes float, got '0.1'"),
    ],
)
def test_settings_of_another_type_are_refused_when_they_are_made(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make()
