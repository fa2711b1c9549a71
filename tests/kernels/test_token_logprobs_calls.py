"""Calls of the log-probabilities of targets: what is refused, under compilers, and their memory."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, linear_token_logprobs, token_logprobs
from esper_kernels.ops.linear_cross_entropy import sizes
from esper_kernels.ops.token_logprobs import reference
from tests.helpers.logprobs import inputs, weighted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
X = torch.zeros(2, 3)
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: token_logprobs(X, T + 2), IndexError, r"target 3 of row \(1,\)"),
        (lambda: token_logprobs(X, T[:1]), ValueError, r"targets of shape \(2,\)"),
        (lambda: token_logprobs(X.long(), T), TypeError, "logits must be one of"),
        (lambda: token_logprobs(X, T, temperature=0), ValueError, r"temperature must be in \["),
        (lambda: token_logprobs(X, T, temperature=torch.nan), ValueError, "temperature must be in"),
        (lambda: token_logprobs(X, T, temperature=True), TypeError, "int or a float, got bool"),
        (
            lambda: token_logprobs(X.double(), T, config=KernelConfig(backend="cpp")),
            ValueError,
            "no backend serves token_logprobs.*float64 is served by eager only",
        ),
        (
            lambda: linear_token_logprobs(X, X, T, config=KernelConfig(backend="cuda")),
            ValueError,
            "no backend serves token_logprobs.*on CUDA only",
        ),
        (lambda: token_logprobs(X, T, ignore_index=None), TypeError, "ignore_index must be an int"),  # type: ignore[arg-type]
        (lambda: linear_token_logprobs(X, X[:, :2], T), ValueError, "hidden must be"),
        (lambda: torch.vmap(lambda x: token_logprobs(x, T))(X[None]), NotImplementedError, "vmap"),
        (
            lambda: torch.func.grad(lambda w: linear_token_logprobs(X, w, T).sum())(X),
            NotImplementedError,
            "linear_token_logprobs does not work inside",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),)),
    "grad": lambda f: torch.func.grad(f)(X),
    "vmap": lambda f: torch.vmap(f)(X[None]),
    "torch.jit.trace": lambda f: torch.jit.trace(f, X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_by_name(config: KernelConfig, name: str) -> None:
    def function(x: Tensor) -> Tensor:
        logprobs = token_logprobs(x, T, config=config)
        assert isinstance(logprobs, Tensor)
        return logprobs.sum()

    with pytest.raises(NotImplementedError, match="token_logprobs does not work inside"):
        TRANSFORMS[name](function)


def test_gradients_of_a_batch_of_losses_are_refused(config: KernelConfig) -> None:
    leaf = X.clone().requires_grad_()
    logprobs = token_logprobs(leaf, T, config=config)
    assert isinstance(logprobs, Tensor)
    with pytest.raises(NotImplementedError, match="gradient of token_logprobs does not work"):
        torch.autograd.grad(logprobs, leaf, torch.eye(2), is_grads_batched=True)


def test_double_backward_raises(config: KernelConfig) -> None:
    """It also raises if only the incoming gradient has a history."""
    logits, targets = inputs(6)
    logprobs, entropy = token_logprobs(logits, targets, entropy=True, config=config)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs is differentiable once"):
        grad.square().sum().backward()
    factor = torch.ones(6, requires_grad=True)
    (grad,) = torch.autograd.grad(entropy, logits, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs is differentiable once"):
        torch.autograd.grad(grad.sum(), factor)


def test_a_later_change_of_what_was_saved_is_noticed(config: KernelConfig) -> None:
    logits, targets = inputs(6)
    _, entropy = token_logprobs(logits, targets, entropy=True, config=config)
    entropy.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.sum().backward()


@pytest.mark.best_instructions
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_equals_eager(config: KernelConfig, compiler: str) -> None:
    torch._dynamo.reset()

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs, entropy = linear_token_logprobs(
            hidden, weight, targets, entropy=True, config=config
        )
        return weighted(logprobs, entropy) + token_logprobs(hidden, targets, config=config).sum()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for run in (function, compiled):
        hidden, targets = inputs(9, classes=5)
        weight = torch.ones(5, 5, requires_grad=True)
        results.append(torch.autograd.grad(run(hidden, weight, targets), [hidden, weight]))
    torch.testing.assert_close(results[1], results[0])
    targets[0] = 5
    with pytest.raises((IndexError, RuntimeError), match="target 5 of row"):
        compiled(hidden, weight, targets)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_ops_are_what_their_schemas_say(dtype: torch.dtype, entropy: bool) -> None:
    logits, targets = inputs(5, dtype=dtype)
    logits = logits.detach()
    numbers = [torch.empty(5), torch.empty(5) if entropy else None]
    row_sums = torch.empty(5, 2)
    call = (logits, targets, -100, 0.7, 0)
    forward = torch.ops.esper.token_logprobs.default
    torch.library.opcheck(forward, (*call, *numbers, None))
    torch.library.opcheck(forward, (*call, *numbers, row_sums))
    forward(*call, *numbers, row_sums)
    grads = (torch.ones(5), torch.ones(5) if entropy else None)
    torch.library.opcheck(
        torch.ops.esper.token_logprobs_backward.default,
        (*call, numbers[1], row_sums, *grads, torch.empty_like(logits)),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature in"),
        ({"logprobs": torch.empty(4)}, "logprobs to be contiguous"),
        ({"entropy": torch.empty(5, dtype=torch.float64)}, "entropy to have another dtype"),
        ({"row_sums": torch.empty(5)}, "row_sums to be contiguous"),
        ({"targets": torch.full((5,), 33)}, "target 33 of row 0"),
    ],
)
def test_the_op_refuses_what_would_touch_other_memory(change: Any, words: str) -> None:
    logits, targets = inputs(5)
    call: dict[str, Any] = {"logits": logits.detach(), "targets": targets, "ignore_index": -100}
    call |= {"temperature": 1.0, "instruction_set": 0, "logprobs": torch.empty(5)}
    call |= {"entropy": None, "row_sums": None}
    with pytest.raises((ValueError, IndexError), match=words):
        torch.ops.esper.token_logprobs.default(**(call | change))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_nothing_of_the_size_of_the_logits_is_allocated(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the gradient, each tensor that torch allocates has at most a few rows."""
    monkeypatch.setattr(reference, "_CPU_BYTES", 4 * 33 * 3)
    logits, targets = inputs(64)
    config = KernelConfig(backend=backend)
    with torch.profiler.profile(profile_memory=True) as profile:
        results = token_logprobs(logits, targets, entropy=True, config=config)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest <= 4 * 64 * 8 < logits.nbytes
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(results, logits, [torch.ones(64), torch.ones(64)])
    sizes_made = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    assert [size for size in sizes_made if size > 4 * 64 * 8] == [logits.nbytes]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_the_logits_of_hidden_states_exist_in_chunks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk has 7 of 64 rows; the other tensors are no larger."""
    monkeypatch.setattr(sizes, "chunk_rows", lambda *arguments: 7)
    monkeypatch.setattr(sizes, "CPU_PANEL", 16)
    _, targets = inputs(64)
    hidden = torch.randn(64, 3, requires_grad=True)
    weight = torch.randn(33, 3, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        results = linear_token_logprobs(
            hidden, weight, targets, entropy=True, config=KernelConfig(backend=backend)
        )
        torch.autograd.grad(weighted(*results), [hidden, weight])
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 4 * 7 * 33 <= largest < 4 * 64 * 33 // 4


def test_a_pure_python_install_serves_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled ops are missing there, one of which gives large gradients huge pages."""
    monkeypatch.setattr(torch.ops, "esper", SimpleNamespace())
    logits, targets = inputs(33, classes=40_000)
    logprobs = token_logprobs(logits, targets, config=KernelConfig(backend="eager"))
    assert isinstance(logprobs, Tensor)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    assert grad.shape == logits.shape
