"""Arguments of a wrong type are refused by name, with what was expected, by the public names."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

import esper_train
from esper_train import (
    GrowthConfig,
    HeuristicConfig,
    HeuristicTamiyo,
    HostConfig,
    OptimizerRegistry,
    RunConfig,
    TelemetryHub,
    TrainConfig,
    cnn_host,
    default_registry,
    from_dict,
    get_task,
)
from esper_train.base.names import unknown_name
from tests.helpers.linear import INPUTS, TARGETS, linear, sgd

# a stand-in for the package, because every argument here has a wrong type
train = cast(Any, esper_train)
SIZES = {"image_size": 8, "in_channels": 1, "num_classes": 10}


def epoch(**wrong: object) -> object:
    model = linear()
    arguments = {"loader": [(INPUTS, TARGETS)], "optimizers": sgd(model)} | wrong
    return train.train_one_epoch(
        model, config=TrainConfig(), task_type="classification", **arguments
    )


def measure(**wrong: object) -> object:
    arguments = {"loader": [(INPUTS, TARGETS)]} | wrong
    return train.evaluate(linear(), config=TrainConfig(), task_type="classification", **arguments)


def fitted(model: torch.nn.Linear | None = None, **wrong: object) -> object:
    model = model or linear()
    return train.fit(
        model,
        [(INPUTS, TARGETS)],
        sgd(model),
        TrainConfig(),
        task_type="classification",
        epochs=1,
        **wrong,
    )


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "loader": (
        lambda: epoch(loader=None),
        "expected a loader to be an iterable of batches, got None; pass a DataLoader, or a list",
    ),
    "on_step": (lambda: epoch(on_step=3), "on_step must be a function or None, got 3"),
    "step": (
        lambda: epoch(step=TrainConfig()),
        "step must be of type TrainStep, got TrainConfig(",
    ),
    "batch": (lambda: measure(batch="pairs"), "batch must be a function or None, got 'pairs'"),
    "forward": (lambda: measure(forward=3), "forward must be a function or None, got 3"),
    "variants": (lambda: measure(variants=["early"]), "variants must be of type Mapping or None"),
    "validation": (lambda: fitted(validation=3), "expected a loader to be an iterable of batch"),
    "on_epoch": (lambda: fitted(on_epoch=3), "on_epoch must be a function or None, got 3"),
    "task type": (lambda: train.build_train_step([], TrainConfig()), "unknown task type []"),
    "one slot": (
        lambda: train.MorphModel(cnn_host(**SIZES), "early"),
        "slots must be a sequence of names, got 'early'; such as slots=['early', 'mid']",
    ),
    "growth": (
        lambda: train.MorphModel(cnn_host(**SIZES), growth={}),
        "growth must be of type GrowthConfig or None, got {}",
    ),
    "registry": (
        lambda: train.MorphModel(cnn_host(**SIZES), registry=[]),
        "registry must be of type BlueprintRegistry or None, got []",
    ),
    "blueprint": (
        lambda: default_registry().register(cast(Any, "norm")),
        "blueprint must be of type Blueprint, got 'norm'",
    ),
    "blueprints": (lambda: train.BlueprintRegistry(3), "blueprints must be of type Iterable, go"),
    "heuristic": (
        lambda: train.HeuristicTamiyo(None, GrowthConfig(), ["norm"]),
        "config must be of type HeuristicConfig, got None",
    ),
    "rotation": (
        lambda: HeuristicTamiyo(HeuristicConfig(), GrowthConfig(), "norm"),
        "blueprints must be a sequence of names, got 'norm'",
    ),
    "image": (lambda: train.cnn_host(**SIZES, width=2.5), "width must be an int, got 2.5"),
    "no classes": (
        lambda: cnn_host(image_size=8, in_channels=1, num_classes=0),
        "num_classes must be at least 1, got 0",
    ),
    "context": (
        lambda: train.transformer_host(vocab_size=11, context="8"),
        "context must be an int, got '8'",
    ),
    "dropout": (
        lambda: train.transformer_host(vocab_size=11, context=8, dropout=None),
        "dropout must be a number in [0, 1], got None",
    ),
    "segments": (
        lambda: train.Host("cnn", [], linear(), {}),
        "segments must be of type Mapping, got []; pass modules by slot name",
    ),
    "name of a task": (
        lambda: replace(get_task("digits"), name=cast(Any, 3)),
        "name of a task must be of type str, got 3",
    ),
    "classes of a task": (
        lambda: replace(get_task("digits"), num_classes=cast(Any, "10")),
        "num_classes must be of type int or None, got '10'",
    ),
    "load": (
        lambda: replace(get_task("digits"), load=cast(Any, None)),
        "load must be a function, got None",
    ),
    "settings of a task": (
        lambda: get_task("digits", cast(Any, HostConfig())),
        "config must be of type TaskConfig or None, got HostConfig(",
    ),
    "hub": (
        lambda: train.run_fit(RunConfig(), hub=[]),
        "hub must be of type TelemetryHub or None, got []",
    ),
    "resume": (
        lambda: train.run_fit(RunConfig(), resume="no"),
        "resume must be of type bool, got 'no'",
    ),
    "telemetry": (
        lambda: TelemetryHub([], cast(Any, {})),
        "config must be of type TelemetryConfig or None, got {}",
    ),
    "values": (
        lambda: from_dict(RunConfig, cast(Any, None)),
        "expected a mapping from setting to value, got None",
    ),
    "base": (
        lambda: from_dict(RunConfig, {}, base=cast(Any, {})),
        "base must be of type RunConfig, got {}",
    ),
    "choice": (
        lambda: train.TelemetryConfig(level=np.zeros(2)),
        "level must be one of off, minimal, normal, debug, got array",
    ),
    "schedule_each": (
        lambda: OptimizerRegistry(schedule_each="batch"),
        "unknown schedule_each 'batch'. Known: step, epoch",
    ),
    "example": (
        lambda: train.export(train.MorphModel(cnn_host(**SIZES)), None),
        "example must be of type Tensor, got None; pass one input [N, ...] with N of at least 2",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_type_is_named(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_validation_that_is_no_loader_is_refused_before_the_first_epoch() -> None:
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match="expected a loader"):
        fitted(model, validation=3)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("digit", ["digits", "cifar10"], "; perhaps 'digits'? "),
        ("imagenet", ["digits", "cifar10"], ". "),
        ("", ["digits"], ". "),
        ("train.grad.evry", ["train.grad.every", "train.grad.clip_norm"], "; perhaps 'train.grad"),
        ("train.grad.colour", ["train.grad.every", "train.grad.clip_norm"], ". "),
    ],
)
def test_only_near_names_are_suggested(name: str, known: list[str], hint: str) -> None:
    assert f"unknown setting {name!r}{hint}" in str(unknown_name("setting", name, known))
