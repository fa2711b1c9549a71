"""One optimizer per group: attaching or detaching one leaves the others alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from esper_train.train.optimizers import OptimizerRegistry


def parameter(seed: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def sgd(*parameters: Tensor) -> SGD:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def set_gradients(step: int, *parameters: nn.Parameter) -> None:
    for i, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))


def test_attach_and_detach_keep_the_momentum_of_the_other_groups() -> None:
    """The host takes the very steps of a lone SGD while seeds come and go beside it."""
    host = parameter(0, 3, 5)
    alone = parameter(0, 3, 5)
    early = parameter(1, 7)
    late = parameter(2, 2)
    reference = sgd(alone)
    host_sgd = sgd(host)
    registry = OptimizerRegistry(host=host_sgd)
    for step in range(8):
        if step == 2:
            registry.attach("early", sgd(early))
        if step == 3:
            registry.attach("late", sgd(late))
        if step == 4:
            registry.detach("early")
        if step == 6:
            registry.attach("early", sgd(early))
        set_gradients(step, host)
        set_gradients(step, alone)
        set_gradients(step + 50, early, late)
        registry.step()
        reference.step()
        assert torch.equal(host, alone)
        assert torch.equal(
            host_sgd.state[host]["momentum_buffer"], reference.state[alone]["momentum_buffer"]
        )


def test_detach_stops_the_steps_of_that_group_only() -> None:
    host = parameter(0, 3)
    seed = parameter(1, 4)
    registry = OptimizerRegistry(host=sgd(host), mid=sgd(seed))
    registry.detach("mid")
    before = host.detach().clone(), seed.detach().clone()
    set_gradients(0, host, seed)
    registry.step()
    assert not torch.equal(host, before[0])
    assert torch.equal(seed, before[1])
    assert "mid" not in registry
    assert "host" in registry


def test_attach_of_a_detached_name_starts_without_the_old_momentum() -> None:
    """One step from rest moves by lr * (gradient + decay * weight), with no momentum in it."""
    seed = parameter(1, 4)
    registry = OptimizerRegistry(mid=sgd(seed))
    set_gradients(0, seed)
    registry.step()
    registry.detach("mid")
    registry.attach("mid", sgd(seed))
    before = seed.detach().double()
    set_gradients(1, seed)
    assert seed.grad is not None
    expected = before - 0.1 * (seed.grad.double() + 0.01 * before)
    registry.step()
    torch.testing.assert_close(seed.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_parameters_are_listed_by_group_in_the_optimizers_order() -> None:
    first, second, third, seed = (parameter(i, i + 1) for i in range(4))
    optimizer = SGD([{"params": [second, first]}, {"params": [third]}], lr=0.1)
    listed = OptimizerRegistry(host=optimizer, late=sgd(seed), mid=None).parameters()
    assert list(listed) == ["host", "late", "mid"]
    assert [id(p) for p in listed["host"]] == [id(second), id(first), id(third)]
    assert [id(p) for p in listed["late"]] == [id(seed)]
    assert listed["mid"] == []


def test_a_group_without_parameters_steps_saves_and_detaches() -> None:
    host = parameter(0, 3)
    registry = OptimizerRegistry(host=sgd(host))
    registry.attach("mid", None)
    assert "mid" in registry
    before = host.detach().clone()
    set_gradients(0, host)
    registry.step()
    assert not torch.equal(host, before)
    state = registry.state_dict()
    assert state["mid"] is None
    registry.load_state_dict(state)
    registry.detach("mid")
    assert "mid" not in registry


def test_attach_refuses_a_taken_name_and_keeps_the_first() -> None:
    host = parameter(0, 3)
    other = parameter(1, 3)
    registry = OptimizerRegistry(host=sgd(host))
    with pytest.raises(ValueError, match=r"group 'host' has an optimizer already; detach it first"):
        registry.attach("host", sgd(other))
    assert [id(p) for p in registry.parameters()["host"]] == [id(host)]


def test_attach_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(
        TypeError, match=r"group 'host': expected a torch\.optim\.Optimizer.*a list"
    ):
        OptimizerRegistry(host=[])  # type: ignore[arg-type]


def test_attach_refuses_the_name_of_a_group_without_parameters() -> None:
    registry = OptimizerRegistry()
    registry.attach("mid", None)
    with pytest.raises(ValueError, match=r"group 'mid' has an optimizer already"):
        registry.attach("mid", sgd(parameter(0, 2)))
    assert registry.parameters() == {"mid": []}


def test_detach_refuses_an_unknown_name_and_lists_the_attached() -> None:
    registry = OptimizerRegistry(host=sgd(parameter(0, 3)), mid=None)
    with pytest.raises(ValueError, match=r"no group 'late'; attached are host, mid"):
        registry.detach("late")
    assert "host" in registry
    assert "mid" in registry


def test_detach_of_an_empty_registry_says_none() -> None:
    with pytest.raises(ValueError, match=r"no group 'host'; attached are none"):
        OptimizerRegistry().detach("host")


def test_load_state_dict_goes_on_where_state_dict_left_off() -> None:
    original = [parameter(0, 3, 2), parameter(1, 5)]
    first = OptimizerRegistry(host=sgd(original[0]), mid=sgd(original[1]))
    for step in range(3):
        set_gradients(step, *original)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in original]
    second = OptimizerRegistry(host=sgd(resumed[0]), mid=sgd(resumed[1]))
    second.load_state_dict(saved)
    for step in range(3, 6):
        set_gradients(step, *original)
        set_gradients(step, *resumed)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(original, resumed, strict=True))


@pytest.mark.parametrize("groups", [[], ["host"], ["host", "late"], ["host", "mid", "late"]])
def test_load_state_dict_refuses_the_state_of_other_groups(groups: list[str]) -> None:
    p = parameter(0, 3)
    q = parameter(1, 4)
    registry = OptimizerRegistry(host=sgd(p), mid=sgd(q))
    set_gradients(0, p, q)
    registry.step()
    before = copy.deepcopy(registry.state_dict())
    donor = OptimizerRegistry(**{group: sgd(parameter(2, 3)) for group in groups})
    with pytest.raises(
        ValueError, match=r"state for the groups \['host', 'mid'\], got \["
    ) as caught:
        registry.load_state_dict(donor.state_dict())
    assert str(groups) in str(caught.value)
    assert_same(registry.state_dict(), before)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected
