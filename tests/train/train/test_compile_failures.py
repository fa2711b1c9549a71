"""Steps compiled by a step object of their own, and what happens when a compiler fails."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from esper_kernels import Meter
from esper_train import CompileConfig, TrainConfig, build_train_step, train_one_epoch
from tests.helpers.compilers import Counting, compiled_config
from tests.helpers.linear import INPUTS, TARGETS, Normed, linear, train


def without_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
    """A compiler whose backward fails, and only when it is needed."""

    def forward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        def fails(*arguments: Tensor) -> object:
            raise RuntimeError("no backward here")

        return make_boxed_func(fails)

    return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=backward)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_failing_compiler_of_the_backward_pass_is_a_failure_like_any_other(
    accumulate: int,
) -> None:
    torch._dynamo.reset()
    batches = [(INPUTS, TARGETS), (INPUTS + 1, TARGETS), (INPUTS[:5], TARGETS[:5])]
    config = TrainConfig(
        accumulate=accumulate,
        compile=CompileConfig(enabled=True, backend=without_backward, on_failure="eager"),
    )
    ours = Normed()
    ours.drop.eval()
    plain = copy.deepcopy(ours)
    result = train(ours, batches, config)
    expected = train(plain, batches, TrainConfig(accumulate=accumulate))
    assert "no backward here" in (result.compile_failure or "")
    assert not result.compiled
    assert (result.loss, result.correct, result.valid) == (
        expected.loss,
        expected.correct,
        expected.valid,
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="no backward here"):
        train(
            Normed(),
            batches,
            TrainConfig(compile=CompileConfig(enabled=True, backend=without_backward)),
        )


def test_what_eager_fails_at_too_is_raised_and_is_no_failure_of_the_compiler() -> None:
    torch._dynamo.reset()
    config = TrainConfig(compile=CompileConfig(enabled=True, backend="eager", on_failure="eager"))
    step = build_train_step("classification", config)
    with pytest.raises(IndexError):
        train(linear(), [(INPUTS, TARGETS + 5)], config, step=step)
    assert step.compile_failure is None


def test_an_unknown_compiler_is_refused_by_name() -> None:
    config = TrainConfig(compile=CompileConfig(enabled=True, backend="inductr"))
    with pytest.raises(ValueError, match="perhaps 'inductor'"):
        build_train_step("classification", config)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_two_configs_in_one_process_do_not_see_each_other(compiled_first: bool) -> None:
    """One run compiles, the other does not, in either order; both train the same weights."""
    torch._dynamo.reset()
    counting = Counting()
    configs = {"compiled": compiled_config(counting), "eager": TrainConfig()}
    results = {}
    weights = {}
    for name in ("compiled", "eager") if compiled_first else ("eager", "compiled"):
        model = linear()
        graphs = counting.graphs
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        results[name] = train_one_epoch(
            model, [(INPUTS, TARGETS)] * 3, optimizer, configs[name], task_type="classification"
        )
        weights[name] = copy.deepcopy(model.state_dict())
        assert (counting.graphs > graphs) is (name == "compiled")
    assert (results["compiled"].compiled, results["eager"].compiled) == (True, False)
    torch.testing.assert_close(weights["compiled"], weights["eager"])
    assert results["compiled"].loss == pytest.approx(results["eager"].loss, rel=1e-6)


def broken_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
    raise RuntimeError("this compiler is broken")


def test_compile_failure_raises_by_default() -> None:
    torch._dynamo.reset()
    step = build_train_step("classification", compiled_config(broken_backend))
    with pytest.raises(Exception, match="this compiler is broken"):
        step(linear(), INPUTS, TARGETS, Meter("cpu"))
    assert step.compiled


def test_compile_failure_falls_back_with_the_reason_in_the_result() -> None:
    torch._dynamo.reset()
    config = compiled_config(broken_backend, on_failure="eager")
    model = linear()
    plain = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_one_epoch(
        model, [(INPUTS, TARGETS)], optimizer, config, task_type="classification"
    )
    assert not result.compiled
    assert "this compiler is broken" in (result.compile_failure or "")
    F.cross_entropy(plain(INPUTS), TARGETS).backward()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


def test_a_models_own_error_is_not_taken_for_a_compile_failure() -> None:
    torch._dynamo.reset()
    step = build_train_step("classification", compiled_config("eager", on_failure="eager"))
    with pytest.raises(Exception, match=r"shapes cannot be multiplied|must match"):
        step(linear(), INPUTS[:, :2], TARGETS, Meter("cpu"))


@pytest.mark.slow
def test_inductor_trains_the_same_weights() -> None:
    torch._dynamo.reset()
    compiled = linear()
    plain = linear()
    for model, config in (
        (compiled, TrainConfig(compile=CompileConfig(enabled=True))),
        (plain, TrainConfig()),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_one_epoch(
            model, [(INPUTS, TARGETS)] * 3, optimizer, config, task_type="classification"
        )
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
