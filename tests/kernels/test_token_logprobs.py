"""Log-probabilities of targets and entropies, from logits and from hidden states, against
`torch.distributions.Categorical` in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import KernelConfig, linear_token_logprobs, token_logprobs
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.ops.linear_cross_entropy import sizes
from esper_kernels.ops.token_logprobs import reference
from esper_kernels.testing import relative_error
from tests.helpers.logprobs import inputs, truth, weighted

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The gradient is rounded once to the dtype; log-probabilities and entropies are not.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}
EAGER = KernelConfig(backend="eager")
with_dtypes = pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several parts of each, the last of them ragged."""
    monkeypatch.setattr(reference, "_CPU_BYTES", 4 * 33 * 3)
    monkeypatch.setattr(sizes, "CPU_PANEL", 16)
    monkeypatch.setattr(sizes, "chunk_rows", lambda *arguments: 7)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
@pytest.mark.parametrize("shape", [(16,), (), (0,), (1,), (3, 5), (2, 0)])
@with_dtypes
def test_values_and_gradients(
    config: KernelConfig, logits_dtype: torch.dtype, shape: tuple[int, ...], temperature: float
) -> None:
    dtype = logits_dtype
    logits, targets = inputs(*shape, dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    for entropy in (False, True):
        expected = truth(exact, targets, temperature)[: 1 + entropy]
        actual = token_logprobs(
            logits, targets, temperature=temperature, entropy=entropy, config=config
        )
        actual = actual if isinstance(actual, tuple) else (actual,)
        for ours, true in zip(actual, expected, strict=True):
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ours.shape == shape
            assert relative_error(ours, true) < 2e-6
        (grad,) = torch.autograd.grad(weighted(*actual), logits)
        (true_grad,) = torch.autograd.grad(weighted(*expected), exact)
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) < ROUNDING[dtype]


def test_gradients_are_those_of_finite_differences() -> None:
    """The comparison is in float64, and both results have another factor for each row."""
    logits, targets = inputs(6, dtype=torch.float64)
    for temperature in (1.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, t=temperature: token_logprobs(x, targets, temperature=t, entropy=True),
            logits,
        )


@with_dtypes
@pytest.mark.parametrize("with_bias", [True, False])
def test_from_hidden_states(
    config: KernelConfig, logits_dtype: torch.dtype, with_bias: bool
) -> None:
    """Hidden states and weights of few bits, so that the logits are exact in every dtype."""
    dtype = logits_dtype
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
        config=config,
    )
    for ours, true in zip(actual, expected, strict=True):
        assert relative_error(ours, true) < 2e-6
    grads = torch.autograd.grad(weighted(*actual), leaves)
    true_grads = torch.autograd.grad(weighted(*expected), exact)
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true) < 4 * ROUNDING[dtype]  # gradients of logits are rounded


def test_hand_computed_numbers(config: KernelConfig) -> None:
    """exp of the logits is 1, 2, 1: probabilities 1/4, 1/2, 1/4, entropy 1.5 ln 2. The gradient of
    the entropy is -p (ln p + H): for p = 1/4 it is ln 2 / 8."""
    logits = torch.tensor([[0.0, 0.6931471805599453, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), entropy=True, config=config)
    assert logprobs.item() == pytest.approx(-1.3862943611198906)
    assert entropy.item() == pytest.approx(1.0397207708399179)
    (of_logprob,) = torch.autograd.grad(logprobs, logits, retain_graph=True)
    torch.testing.assert_close(of_logprob, torch.tensor([[0.75, -0.5, -0.25]]))
    (of_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    expected = 0.08664339756999316
    torch.testing.assert_close(of_entropy, torch.tensor([[expected, -2 * expected, expected]]))


@pytest.mark.parametrize("v", [3, 40, 5000])
def test_logits_of_minus_infinity_are_ordinary(config: KernelConfig, v: int) -> None:
    """A mask of classes: 2 remain, with probability 1/2 each; the second target is masked."""
    row = torch.full((v,), -torch.inf)
    row[0] = row[v - 1] = 1.0
    logits = row.repeat(2, 1).requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), entropy=True, config=config)
    torch.testing.assert_close(logprobs, torch.tensor([-0.6931471805599453, -torch.inf]))
    torch.testing.assert_close(entropy, torch.full((2,), 0.6931471805599453))
    (logprobs + entropy).sum().backward()
    expected = torch.zeros(2, v)
    expected[:, [0, v - 1]] = torch.tensor([[0.5, -0.5], [-0.5, -0.5]])
    expected[1, 1] = 1.0
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("v", [3, 40, 5000])
def test_rows_that_are_not_finite_give_nan(config: KernelConfig, v: int) -> None:
    """NaN, inf or nothing but -inf in a row, unless it is ignored; other rows are as without it."""
    logits, _ = inputs(5, classes=v)
    logits = logits.detach()
    logits[0, v - 1] = torch.nan
    logits[1, 0] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1] = torch.nan
    targets = torch.tensor([1, 1, 1, -100, 1])
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets, entropy=True, config=config)
    (grad,) = torch.autograd.grad(weighted(logprobs, entropy), leaf)
    expected = truth(logits.detach()[4:], targets[4:])
    for actual, true in zip((logprobs, entropy), expected, strict=True):
        assert actual[:3].isnan().all()
        assert actual[3] == 0
        torch.testing.assert_close(actual[4:].double(), true, rtol=2e-6, atol=1e-7)
    assert grad[:3].isnan().all()
    assert not grad[3].any()
    assert grad[4].isfinite().all()


def test_a_large_offset_costs_no_precision(config: KernelConfig) -> None:
    logits, targets = inputs(16)
    small = logits.detach().round()
    found = []
    for x in (small, small + 1e7):
        leaf = x.clone().requires_grad_()
        results = token_logprobs(leaf, targets, temperature=0.7, entropy=True, config=config)
        found.append((*results, *torch.autograd.grad(weighted(*results), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("temperature", [2.0**-100, 1e-3, 1e3, 2.0**100])
def test_every_temperature_in_its_range(config: KernelConfig, temperature: float) -> None:
    """The temperatures range from one that selects the largest logit to one that makes all logits
    equal."""
    logits, targets = inputs(7)
    logprobs, entropy = token_logprobs(
        logits, targets, temperature=temperature, entropy=True, config=config
    )
    exact = logits.detach().double().requires_grad_()
    expected = token_logprobs(exact, targets, temperature=temperature, entropy=True, config=EAGER)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=3e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(weighted(logprobs, entropy), logits)
    (true_grad,) = torch.autograd.grad(weighted(*expected), exact)
    size = true_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6 * size)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "classes apart": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows apart": lambda x: F.pad(x, (1, 2), value=7.0)[..., 1:-2],
    "shifted sequence": lambda x: F.pad(x, (0, 0, 0, 1))[:, :-1],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every second row": lambda x: torch.stack([x, x], -2)[..., 0, :],
    "negated view": lambda x: torch._neg_view(-x),
    "four dimensions": lambda x: x[:, :, None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_any_layout(config: KernelConfig, layout: str) -> None:
    logits, targets = inputs(3, 5)
    logits = logits.detach()
    view = LAYOUTS[layout](logits)
    targets = targets.to(torch.int32).t().contiguous().t().view(view.shape[:-1])
    found = []
    for x in (logits.view(view.shape), view):
        leaf = x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            results = token_logprobs(leaf, targets, entropy=True, config=config)
        found.append((*results, *torch.autograd.grad(weighted(*results), leaf)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_of_every_width(name: str, dtype: torch.dtype) -> None:
    """The widths lie around those of vectors and of the chunks of long rows."""
    config = KernelConfig(backend="cpp", instruction_set=name)
    widths = [(5, v) for v in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)]
    widths += [(3, v) for v in (1023, 1024, 1025, 2049, 4095, 4096, 4097, 8193, 9001)]
    for rows, v in widths:
        assert_rows_are_right(rows, v, dtype, config)


def assert_rows_are_right(rows: int, v: int, dtype: torch.dtype, config: KernelConfig) -> None:
    logits, targets = inputs(rows, classes=v, dtype=dtype)
    results = token_logprobs(logits, targets, temperature=0.7, entropy=True, config=config)
    (grad,) = torch.autograd.grad(weighted(*results), logits)
    exact = logits.detach().double().requires_grad_()
    expected = truth(exact, targets, 0.7)
    (true_grad,) = torch.autograd.grad(weighted(*expected), exact)
    for ours, true in zip(results, expected, strict=True):
        assert relative_error(ours, true) < 3e-6, v
    if v > 1:  # otherwise it is 0
        assert relative_error(grad, true_grad) < 2 * ROUNDING[dtype], v
    else:
        assert not grad.any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if i or j else [])
        for i, name in enumerate(INSTRUCTION_SETS)
        for j, dtype in enumerate(DTYPES[:3])
    ],
    ids=str,
)
def test_gradients_stored_past_the_caches(name: str, dtype: torch.dtype) -> None:
    config = KernelConfig(backend="cpp", instruction_set=name)
    assert_rows_are_right((18 << 20) // dtype.itemsize // 65537, 65537, dtype, config)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", [(20_001, 10), (700, 257), (3, 70_001)])
def test_threads_change_no_bit(name: str, shape: tuple[int, int]) -> None:
    config = KernelConfig(backend="cpp", instruction_set=name)
    logits, targets = inputs(shape[0], classes=shape[1])
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results = token_logprobs(logits, targets, entropy=True, config=config)
            found.append((*results, *torch.autograd.grad(weighted(*results), logits)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_frozen_gets_no_gradient(config: KernelConfig) -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(33, 4)
    targets = torch.arange(6)
    actual = linear_token_logprobs(hidden, weight, targets, config=config)
    assert isinstance(actual, Tensor)
    actual.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not linear_token_logprobs(hidden.detach(), weight, targets).requires_grad  # type: ignore[union-attr]
