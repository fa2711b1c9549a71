"""Models, batches and losses as users have them train in the loop as in a plain loop."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from esper_train import AmpConfig, CompileConfig, TrainConfig, evaluate, train_one_epoch
from tests.helpers.problems import PROBLEMS, Problem

CONFIGS = {
    "plain": TrainConfig(),
    "accumulated": TrainConfig(accumulate=2),
    "compiled": TrainConfig(compile=CompileConfig(enabled=True, backend="aot_eager")),
    "bfloat16": TrainConfig(amp=AmpConfig(dtype="bfloat16")),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_loop(problem: Problem, model: nn.Module, config: TrainConfig) -> float:
    """Train for one epoch by hand; returns the mean loss over the rows."""
    optimizer = sgd(model)
    batches = iter(problem.batches)
    lost = weights = 0.0
    model.train()
    while group := list(islice(batches, config.accumulate)):
        optimizer.zero_grad()
        shares = [1.0 if problem.by_batch else problem.rows(b) for b in group]
        for batch, share in zip(group, shares, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.amp.dtype is not None):
                loss = problem.loss(model, batch)
            (loss * share / sum(shares)).backward()
            lost += loss.item() * problem.rows(batch)
            weights += problem.rows(batch)
        optimizer.step()
    return lost / weights


def assert_close(found: Any, expected: Any, config: TrainConfig) -> None:
    """Compare to 1e-6; in bfloat16, a gradient on the verge of two numbers may be rounded to the
    other."""
    tolerance = 1e-6 if config.amp.dtype is None else 2e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loop_trains_as_a_plain_loop_does(name: str, how: str) -> None:
    torch._dynamo.reset()
    problem = PROBLEMS[name]
    config = CONFIGS[how]
    ours = problem.model()
    plain = problem.model()
    loss = plain_loop(problem, plain, config)
    result = train_one_epoch(
        ours, problem.batches, sgd(ours), config, task_type=problem.task_type, **problem.options
    )
    assert_close(result.loss, loss, config)
    assert_close(ours.state_dict(), plain.state_dict(), config)
    assert result.batches == len(problem.batches)
    assert result.compiled == config.compile.enabled


@pytest.mark.parametrize("name", PROBLEMS)
def test_evaluate_measures_as_a_plain_loop_does(name: str) -> None:
    problem = PROBLEMS[name]
    model = problem.model().eval()
    with torch.no_grad():
        losses = [problem.loss(model, batch).item() for batch in problem.batches]
    weights = [problem.rows(batch) for batch in problem.batches]
    expected = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    result = evaluate(
        model, problem.batches, TrainConfig(), task_type=problem.task_type, **problem.options
    )
    assert result.loss == pytest.approx(expected / sum(weights), rel=1e-6)
