"""Schedules of learning rates."""

import pytest
import torch

from esper_train import OptimConfig, OptimizerRegistry
from esper_train.base.settings import from_dict
from esper_train.train.optimizers import make_schedule
from tests.helpers.linear import linear


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
@pytest.mark.parametrize("each", ["step", "epoch"])
@pytest.mark.parametrize("longer", [7, 4, 3])
def test_a_schedule_follows_the_length_of_a_resumed_run(kind: str, each: str, longer: int) -> None:
    """After 3 of 5 epochs the run is resumed with another length."""
    config = from_dict(OptimConfig, {"schedule": {"kind": kind, "each": each, "final": 0.1}})
    per_epoch = 2 if each == "step" else 1

    def rates(length: int) -> tuple[OptimizerRegistry, list[float]]:
        optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
        schedule = make_schedule(optimizer, config.schedule, length * per_epoch)
        registry = OptimizerRegistry(schedule_each=each)
        registry.attach("host", optimizer, schedule)
        seen = []
        for _ in range(length * per_epoch):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            registry.advance(each)
        return registry, seen

    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    resumed = OptimizerRegistry(schedule_each=each)
    resumed.attach("host", optimizer, make_schedule(optimizer, config.schedule, 5 * per_epoch))
    for _ in range(3 * per_epoch):
        optimizer.step()
        resumed.advance(each)
    resumed.load_state_dict(resumed.state_dict())
    resumed.fit_schedules(config.schedule, (longer - 3) * per_epoch)
    seen = []
    for _ in range((longer - 3) * per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        resumed.advance(each)
    _, expected = rates(longer)
    assert seen == pytest.approx(expected[3 * per_epoch :], rel=1e-9)
