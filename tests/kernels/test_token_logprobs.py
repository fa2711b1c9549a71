"""Log-probabilities of targets and entropies, from logits and from hidden states, against
`torch.distributions.Categorical` in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import linear_token_logprobs, token_logprobs
from esper_kernels.ops.linear_cross_entropy import sizes
from esper_kernels.ops.token_logprobs import op
from esper_kernels.testing import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The gradient is rounded once to the dtype; log-probabilities and entropies are not.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several parts of each, the last of them ragged."""
    monkeypatch.setattr(op, "_CPU_BYTES", 4 * 33 * 3)
    monkeypatch.setattr(sizes, "CPU_PANEL", 16)
    monkeypatch.setattr(sizes, "chunk_rows", lambda *arguments: 7)


def truth(
    logits: Tensor, targets: Tensor, temperature: float, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    categorical = torch.distributions.Categorical(
        logits=logits.double() / temperature, validate_args=False
    )
    valid = targets != ignored
    logprobs = categorical.log_prob(torch.where(valid, targets, 0).long())
    return torch.where(valid, logprobs, 0.0), torch.where(valid, categorical.entropy(), 0.0)


def inputs(
    *shape: int, classes: int = 33, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*shape, classes, generator=generator) * 3).to(dtype).requires_grad_()
    targets = torch.randint(classes, shape, generator=generator)
    targets.view(-1)[1::4] = -100
    return logits, targets


def weighted(logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
    """A sum with another factor for each row."""
    factor = torch.linspace(-1.0, 2.0, logprobs.numel()).view(logprobs.shape)
    total = (factor * logprobs).sum()
    return total if entropy is None else total + ((factor + 0.5) * entropy).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
@pytest.mark.parametrize("shape", [(16,), (), (0,), (1,), (3, 5), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], temperature: float
) -> None:
    logits, targets = inputs(*shape, dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    for entropy in (False, True):
        expected = truth(exact, targets, temperature)[: 1 + entropy]
        actual = token_logprobs(logits, targets, temperature=temperature, entropy=entropy)
        actual = actual if isinstance(actual, tuple) else (actual,)
        for ours, true in zip(actual, expected, strict=True):
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ours.shape == shape
            assert relative_error(ours, true) < 2e-6
        (grad,) = torch.autograd.grad(weighted(*actual), logits)
        (true_grad,) = torch.autograd.grad(weighted(*expected), exact)
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_from_hidden_states(dtype: torch.dtype, with_bias: bool) -> None:
    """Hidden states and weights of few bits, so that the logits are exact in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return x.requires_grad_()

    leaves = [leaf(5, 4, 6), leaf(33, 6), *([leaf(33)] if with_bias else [])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    _, targets = inputs(5, 4)
    expected = truth(F.linear(*exact), targets, 2.0)
    actual = linear_token_logprobs(
        leaves[0],
        leaves[1],
        targets,
        bias=leaves[2] if with_bias else None,
        temperature=2.0,
        entropy=True,
    )
    for ours, true in zip(actual, expected, strict=True):
        assert relative_error(ours, true) < 2e-6
    grads = torch.autograd.grad(weighted(*actual), leaves)
    true_grads = torch.autograd.grad(weighted(*expected), exact)
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true) < 4 * ROUNDING[dtype]  # gradients of logits are rounded


def test_hand_computed_numbers() -> None:
    """exp of the logits is 1, 2, 1: probabilities 1/4, 1/2, 1/4, entropy 1.5 ln 2."""
    logits = torch.tensor([[0.0, 0.6931471805599453, 0.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), entropy=True)
    assert logprobs.item() == pytest.approx(-1.3862943611198906)
    assert entropy.item() == pytest.approx(1.0397207708399179)


def test_logits_of_minus_infinity_are_ordinary() -> None:
    """A mask of classes: 2 of 3 remain, with probability 1/2 each."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), entropy=True)
    assert logprobs.item() == pytest.approx(-0.6931471805599453)
    assert entropy.item() == pytest.approx(0.6931471805599453)
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0, -0.5]]))


def test_a_large_offset_costs_no_precision() -> None:
    logits, targets = inputs(16)
    small = logits.detach().round()
    expected = token_logprobs(small, targets, entropy=True)
    actual = token_logprobs(small + 1e7, targets, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_strided_logits_and_autocast() -> None:
    logits, targets = inputs(6)
    odd = logits.detach().t().contiguous().t()
    with torch.autocast("cpu", torch.bfloat16):
        actual = token_logprobs(odd, targets)
    assert isinstance(actual, Tensor)
    assert relative_error(actual, truth(logits, targets, 1.0)[0]) < 2e-6


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(33, 4)
    targets = torch.arange(6)
    actual = linear_token_logprobs(hidden, weight, targets)
    assert isinstance(actual, Tensor)
    actual.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not linear_token_logprobs(hidden.detach(), weight, targets).requires_grad  # type: ignore[union-attr]


X = torch.zeros(2, 3)
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: token_logprobs(X, T + 2), IndexError, r"target 3 of row \(1,\)"),
        (lambda: token_logprobs(X, T[:1]), ValueError, r"targets of shape \(2,\)"),
        (lambda: token_logprobs(X.long(), T), TypeError, "logits must be one of"),
        (lambda: token_logprobs(X, T, temperature=0), ValueError, "above 0, got 0"),
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


def test_double_backward_raises() -> None:
    logits, targets = inputs(6)
    logprobs = token_logprobs(logits, targets)
    assert isinstance(logprobs, Tensor)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs is differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_equals_eager(compiler: str) -> None:
    torch._dynamo.reset()

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs, entropy = linear_token_logprobs(hidden, weight, targets, entropy=True)
        return weighted(logprobs, entropy) + token_logprobs(hidden, targets).sum()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for run in (function, compiled):
        hidden, targets = inputs(9, classes=5)
        weight = torch.ones(5, 5, requires_grad=True)
        results.append(torch.autograd.grad(run(hidden, weight, targets), [hidden, weight]))
    torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


def test_nothing_of_the_size_of_the_logits_is_allocated() -> None:
    """In the forward pass: each tensor that torch makes is at most a few rows."""
    logits, targets = inputs(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        token_logprobs(logits.detach(), targets, entropy=True)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest <= 4 * 64 * 8 < logits.nbytes
