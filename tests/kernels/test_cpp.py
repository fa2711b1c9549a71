"""Properties of the compiled CPU backend alone: its ops, its instruction sets, its threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats
from esper_kernels.config import REDUCTIONS
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.testing import cross_entropy_samples, plain_torch_cross_entropy, relative_error

GENERATOR = torch.Generator().manual_seed(0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(n: int, v: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, v, generator=GENERATOR), torch.randint(v, (n,), generator=GENERATOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_ops_are_what_their_schemas_say(full: bool, dtype: torch.dtype) -> None:
    """Each op as it is called: with nothing that may be left out, and with all of it."""
    logits, targets = arguments(5, 40)
    logits = logits.to(dtype)
    meter = Meter("cpu", topk=(5,), per_class=40, calibration_bins=3, entropy=True)
    weight = torch.rand(40, generator=GENERATOR) if full else None
    loss = torch.empty(5 if full else ())
    saved = torch.empty(11)
    grad = torch.empty_like(logits)
    smoothing = torch.tensor(0.1)
    scale = torch.tensor(2.0, dtype=torch.float64)
    options = (weight, -100, 0.1, 0.0, 5.0 if full else None)
    reduction = REDUCTIONS.index("none" if full else "mean")
    accumulators = (
        (meter.sums, meter.counts, meter.ticket, meter.topk, meter.measures)
        if full
        else (None, None, None, (1,), ())
    )
    tensors = (smoothing, None, None, None, scale) if full else ()
    forward = torch.ops.esper.cross_entropy.default
    for out in (grad, None):
        call = (
            logits,
            targets,
            *options,
            reduction,
            None,
            0,
            1.0,
            *accumulators,
            loss,
            saved,
            out,
            *tensors,
        )
        torch.library.opcheck(forward, call)
        forward(*call)
    torch.library.opcheck(
        torch.ops.esper.cross_entropy_backward.default,
        (logits, targets, *options, 0, torch.ones_like(loss), saved, grad, *tensors[:3]),
    )
    columns = (
        torch.empty(2, 2, dtype=torch.float64),
        torch.empty(3, 2, dtype=torch.int64),
        torch.empty((), dtype=torch.float64),
        torch.empty(()),
    )
    inv_scale = torch.tensor(0.5, dtype=torch.float64) if full else None
    torch.library.opcheck(
        torch.ops.esper.grad_stats.default, ([logits, logits[0]], inv_scale, 0, *columns)
    )


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_agrees_with_torch_in_float64(name: str, dtype: torch.dtype) -> None:
    config = KernelConfig(backend="cpp", instruction_set=name)
    bound = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}[dtype]
    for sample, logits, targets, options in cross_entropy_samples(dtype):
        if logits.numel() == 0:
            continue
        leaf = logits.double().requires_grad_()
        (truth,) = torch.autograd.grad(plain_torch_cross_entropy(leaf, targets, **options), leaf)
        grad = cross_entropy_step(logits, targets, None, **options, config=config)
        assert relative_error(grad, truth) <= bound, sample


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("place", ["step", "inplace", "backward"])
@pytest.mark.parametrize("v", [10, 40, 1025, 9000, 70_001])
def test_gradients_of_negligible_classes_are_exactly_zero(v: int, place: str, name: str) -> None:
    """Their logits are 86 or more below the row's largest, which may be in another chunk."""
    config = KernelConfig(backend="cpp", instruction_set=name)
    below = torch.tensor([0.0, 1.0, 40.0, 85.0, 85.75, 86.0, 86.5, 87.0, 87.25, 88.0, torch.inf])
    rows = torch.stack([-below[torch.arange(v) % 11].roll(row * v // 4) for row in range(4)])
    rows[:, v // 2 :] -= 20  # the largest of a later chunk lies lower
    rows[2:] += 3
    distance = rows.amax(-1, keepdim=True) - rows
    targets = rows.argmax(-1)
    if place == "backward":
        leaf = rows.clone().requires_grad_()
        cross_entropy(leaf, targets, reduction="sum", config=config).backward(torch.tensor(2.0**16))
        grad = leaf.grad
    else:
        options = {"reduction": "sum", "grad_scale": 2.0**16, "inplace": place == "inplace"}
        grad = cross_entropy_step(rows, targets, None, **options, config=config)
    assert grad is not None
    assert torch.equal(grad == 0, distance >= 86)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_is_torchs(name: str, dtype: torch.dtype) -> None:
    """Two classes, logits 0: the gradient is -s/2, s/2, so grad_scale chooses the number that is
    rounded."""
    config = KernelConfig(backend="cpp", instruction_set=name)
    logits = torch.zeros(1, 2, dtype=dtype)
    targets = torch.tensor([0])
    exponents = torch.arange(-26, 18).double().exp2()
    mantissas = torch.tensor(
        [1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-12, 1.3]
    )
    for value in (exponents[:, None] * mantissas).flatten().tolist():
        grad = cross_entropy_step(logits, targets, None, grad_scale=2 * value, config=config)
        assert grad[0, 1].item() == torch.tensor(value).to(dtype).item(), value


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", [(20_001, 10), (700, 257), (40, 9000), (3, 70_001)])
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(name: str, shape: tuple[int, int]) -> None:
    logits, targets = arguments(*shape)
    found = []
    for count in (1, 2, 4, 2):
        torch.set_num_threads(count)
        meter = Meter("cpu", topk=(5,))
        config = KernelConfig(instruction_set=name)
        grad = cross_entropy_step(logits, targets, meter, label_smoothing=0.1, config=config)
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, softcap=5.0, config=config)
        loss.backward()
        stats = grad_stats([logits, targets.float(), logits[:1]], config=config)
        found.append(
            (grad, meter.sums, meter.counts, loss, leaf.grad, stats.norms, stats.total_norm)
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("v", [33, 4096, 4097, 70_001])
def test_large_outputs_and_odd_rows_agree_with_a_copy(v: int) -> None:
    """Rows that begin anywhere, outputs stored past the caches, and in place: all the same bits."""
    n = (20 << 20) // (4 * v)
    logits, targets = arguments(n, v)
    parts = zip(logits.split(50), targets.split(50), strict=True)
    expected = torch.cat([cross_entropy_step(x, t, None, reduction="sum") for x, t in parts])
    out = torch.empty(n * v + 3)[3:].view(n, v)
    cross_entropy_step(logits, targets, None, reduction="sum", out=out)
    assert torch.equal(out, expected)
    cross_entropy_step(logits, targets, None, reduction="sum", inplace=True)
    assert torch.equal(logits, expected)


def test_more_leading_dimensions_than_the_op_follows() -> None:
    logits = torch.randn(3, 4, 5, 12, generator=GENERATOR)[:, ::2, 1:4, :11]
    targets = torch.randint(11, logits.shape[:-1], generator=GENERATOR)
    expected = cross_entropy_step(logits.contiguous(), targets, None)
    assert torch.equal(cross_entropy_step(logits, targets, None), expected)
    assert torch.equal(cross_entropy_step(logits, targets, None, inplace=True), expected)
    assert torch.equal(logits, expected)
