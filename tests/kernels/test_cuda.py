"""The CUDA kernels without a GPU: compiled for the host and run by tests/cuda_shim, compiled for
GPUs by nvcc.

On a GPU the other kernel tests run them.

Long file: one simulator and its compiled kernels serve all of these tests.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cuda_resources
from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    native,
    token_logprobs,
)
from esper_kernels.ops.grad_stats import cpp as native_grad_stats
from esper_kernels.testing import (
    assert_no_worse_than_eager,
    plain_torch_cross_entropy,
    relative_error,
)
from tests.cuda_shim.build import ROOT, built_with_sanitizers, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EAGER = KernelConfig(backend="eager")
CPP = KernelConfig(backend="cpp")
# Multiprocessors, bytes of shared memory per block, architecture. Rows lie whole in a block, or in
# a cluster, or are read twice.
DEVICES = {"whole": (3, 227 << 10, 9), "clusters": (16, 6000, 9), "twice": (2, 2000, 8)}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}

Device = Callable[..., None]


@pytest.fixture(scope="session")
def library() -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    return load()


@pytest.fixture
def device(library: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Let calls of the `cpp` backend run the CUDA kernels; the arguments set the make-believe
    device."""

    def choose(name: str = "whole", backwards: bool = False) -> None:
        library.esper_shim_device(*DEVICES[name], backwards)

    monkeypatch.setattr(torch.ops, "esper", torch.ops.esper_shim)
    choose()
    yield choose
    choose()


@pytest.mark.parametrize(
    ("driver", "devices", "kernels", "reason"),
    [
        (0, 0, True, "there is no NVIDIA driver"),
        (
            12080,
            1,
            True,
            "the driver serves CUDA 12.8, the kernels were built with 13.0; it takes a driver "
            "from R580 on, or a build with a CUDA 12 toolkit",
        ),
        (13010, 0, True, "there is no CUDA device"),
        (
            13000,
            1,
            False,
            "the kernels were not built for this GPU; name its architecture in "
            "TORCH_CUDA_ARCH_LIST",
        ),
        (14000, 1, True, ""),
    ],
)
def test_a_gpu_that_cannot_serve_is_refused_with_the_reason(
    library: Any, driver: int, devices: int, kernels: bool, reason: str
) -> None:
    said = ctypes.create_string_buffer(300)
    library.esper_shim_machine(driver, devices, kernels)
    library.esper_cuda_refusal(said, ctypes.c_int64(len(said)))
    library.esper_shim_machine(13000, 1, True)
    assert said.value.decode() == reason


def arguments(
    n: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(v, (n,), generator=generator)
    targets[n // 2 :: 3] = -100
    return (torch.randn(n, v, generator=generator) * 3).to(dtype), targets


def check_step(logits: Tensor, targets: Tensor, **options: Any) -> None:
    """Compare gradient, loss and counts with float64, eager torch and the reference."""
    leaf = logits.double().requires_grad_()
    rival = logits.clone().requires_grad_()
    loss = plain_torch_cross_entropy(leaf, targets, **options)
    (truth,) = torch.autograd.grad(loss, leaf)
    (eager,) = torch.autograd.grad(plain_torch_cross_entropy(rival, targets, **options), rival)
    meters = [Meter("cpu", topk=(1, 5)) for _ in range(3)]
    grad = cross_entropy_step(logits, targets, meters[0], **options, config=CPP)
    assert_no_worse_than_eager(grad, eager, truth)
    actual = cross_entropy(rival, targets, **options, meter=meters[1], config=CPP)
    assert relative_error(actual, loss) <= 2e-6
    (grad,) = torch.autograd.grad(actual, rival)
    assert_no_worse_than_eager(grad, eager, truth)
    cross_entropy(logits, targets, **options, meter=meters[2], config=EAGER)
    for meter in meters[:2]:
        assert torch.equal(meter.counts, meters[2].counts)
        torch.testing.assert_close(meter.sums, meters[2].sums, rtol=2e-6, atol=0)
        assert meter.ticket.item() == 0


def check_sizes(sizes: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
    for v in sizes:
        logits, targets = arguments(rows, v, dtype, seed=v)
        check_step(logits, targets)
        check_step(logits, targets, weight=torch.linspace(0.5, 2.0, v), **EVERYTHING)
        # ties, and rows further apart than they are long
        check_step(logits.repeat_interleave(2, -1)[:, :v], targets)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_kind_agree_with_float64(
    device: Device, name: str, dtype: torch.dtype
) -> None:
    device(name)
    check_sizes((1, 9, 257, 1025, 3001), dtype, rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_size_agree_with_float64(
    device: Device, name: str, dtype: torch.dtype
) -> None:
    device(name)
    check_sizes((3, 7, 8, 16, 31, 32, 33, 64, 65, 127, 128, 255, 256, 511, 512, 513), dtype, rows=7)
    check_sizes(
        (1000, 1023, 1024, 1026, 2047, 2048, 4095, 8191, 10000, 16385, 32001), dtype, rows=3
    )
    check_sizes((50257, 65537, 131072, 200003, 262144), dtype, rows=2)


@pytest.mark.parametrize("offset", range(9))
def test_rows_may_begin_and_end_anywhere(device: Device, offset: int) -> None:
    """Each of the 16-byte phases, for input and output alike or not."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = arguments(3, 1100 + offset, dtype)
        check_step(torch.nn.functional.pad(logits, (offset, 3))[:, offset:-3], targets)
        out = torch.full((3 * logits.shape[1] + 8,), 7.0, dtype=dtype)
        place = out[8 - offset % 8 :][: logits.numel()].view_as(logits)
        grad = cross_entropy_step(logits, targets, None, out=place, config=CPP)
        assert torch.equal(grad, cross_entropy_step(logits, targets, None, config=CPP))
        assert (out == 7).sum() == 8  # nothing around it is written


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("v", [1, 10, 13, 100, 255])
def test_few_classes_are_the_same_however_rows_lie_in_memory(
    device: Device, v: int, backwards: bool
) -> None:
    """Rows lie side by side from every 16-byte phase, or apart; the last tile of rows is not
    full."""
    device(backwards=backwards)
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = arguments(4 * 131, v, dtype)
        options = {"weight": torch.linspace(0.5, 2.0, v), **EVERYTHING}
        check_step(logits, targets, **options)
        expected = cross_entropy_step(logits, targets, None, **options, config=CPP)
        for offset in range(16 // dtype.itemsize):
            memory, out = (torch.full((logits.numel() + 24,), 7.0, dtype=dtype) for _ in range(2))
            moved, place = (
                x[begin:][: logits.numel()].view_as(logits)
                for x, begin in ((memory, offset), (out, 11 - offset))
            )
            moved.copy_(logits)
            cross_entropy_step(moved, targets, None, **options, out=place, config=CPP)
            assert torch.equal(place, expected)
            cross_entropy_step(moved, targets, None, **options, inplace=True, config=CPP)
            assert torch.equal(moved, expected)
            for x in (memory, out):
                assert (x == 7).sum() == 24 + (expected == 7).sum()  # nothing around is written
        apart = torch.nn.functional.pad(logits, (1, 2))[:, 1:-2]
        wide = torch.full((len(logits), v + 3), 7.0, dtype=dtype)
        cross_entropy_step(apart, targets, None, **options, out=wide[:, 2:-1], config=CPP)
        assert torch.equal(wide[:, 2:-1], expected)
        shifted = torch.nn.functional.pad(logits.view(4, 131, v), (0, 0, 0, 1))[:, :-1]
        grad = cross_entropy_step(shifted, targets.view(4, 131), None, **options, config=CPP)
        assert torch.equal(grad.reshape(-1, v), expected)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("shape", [(700, 10), (40, 300), (9, 2000)])
def test_order_of_blocks_and_threads_changes_no_bit(
    device: Device, name: str, shape: tuple[int, int]
) -> None:
    """A missing barrier would let threads that run last to first see other values."""
    logits, targets = arguments(*shape)
    found = []
    for backwards in (False, True):
        device(name, backwards)
        meter = Meter("cpu")
        grad = cross_entropy_step(logits, targets, meter, **EVERYTHING, config=CPP)
        stats = grad_stats(
            [logits, logits[:, 0], logits.new_zeros(0), logits.repeat(40, 3)], config=CPP
        )
        found.append((grad, meter.sums, meter.counts, stats.norms, stats.zeros, stats.total_norm))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("v", [3, 300, 2000])
def test_bad_targets_have_no_gradient_and_are_counted_or_make_the_loss_nan(
    device: Device, v: int
) -> None:
    logits, _ = arguments(4, v)
    targets = torch.tensor([-1, 1, v, 2**40])
    meter = Meter("cpu")
    grad = cross_entropy_step(logits, targets, meter, config=CPP)
    expected = cross_entropy_step(logits[1:2], targets[1:2], None, config=CPP)
    assert torch.equal(grad[1:2], expected)
    assert not grad[[0, 2, 3]].any()
    result = meter.compute(strict=False)
    assert (result.valid, result.bad_targets) == (1, 3)
    assert cross_entropy(logits, targets, config=CPP).isnan()
    assert cross_entropy(logits, targets, meter=meter, config=CPP).isfinite()
    losses = cross_entropy(logits, targets, reduction="none", config=CPP)
    assert losses.isnan().tolist() == [True, False, True, True]
    with pytest.raises(IndexError, match="6 targets"):
        meter.compute()


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.int32, torch.uint8))],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_counted_before(device: Device, dtype: torch.dtype, weighted: bool) -> None:
    """There are more targets than a block looks through by itself."""
    generator = torch.Generator().manual_seed(0)
    n = 140_000 // dtype.itemsize
    logits = torch.randn(n, 3, generator=generator)
    targets = torch.randint(4, (n,), generator=generator)
    options: dict[str, Any] = {
        "ignore_index": 3,
        "weight": torch.tensor([0.5, 1.0, 3.0]) if weighted else None,
    }
    check_step(logits, targets.to(dtype), **options)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("v", [9, 300, 3001])
def test_targets_rank_behind_equal_logits_of_earlier_classes(
    device: Device, name: str, v: int
) -> None:
    """The target's logit is also -inf or a zero, and a row also holds nothing but masks."""
    device(name)
    logits = torch.arange(6.0 * v).view(6, v).remainder(3)
    logits[1] = -logits[1]
    logits[2, ::2] = -torch.inf
    logits[3] = torch.finfo(torch.float32).min
    logits[4, 5:] = -torch.inf
    targets = torch.tensor([v // 2, v - 1, v // 4 * 2, 0, v - 1, 3])
    topk = (1, 2, v // 4 + 1, v // 2, v - 1, v)
    counts = []
    for config in (CPP, EAGER):
        meter = Meter("cpu", topk=topk)
        grad = cross_entropy_step(logits, targets, meter, config=config)
        counts.append((grad, meter.counts))
    torch.testing.assert_close(counts[0][0], counts[1][0], rtol=2e-6, atol=1e-9)
    assert torch.equal(counts[0][1], counts[1][1])


@pytest.mark.parametrize("v", [9, 300, 3001])
def test_exponents_of_minus_86_and_below_give_no_gradient(device: Device, v: int) -> None:
    logits = torch.zeros(2, v)
    logits[:, 0] = torch.tensor([-86.0, 914.0])
    logits[:, 1] = -85.99
    logits[1] += 1000 * (torch.arange(v) > 0)
    grad = cross_entropy_step(logits, torch.tensor([2, 2]), None, grad_scale=1e6, config=CPP)
    assert grad[:, 0].tolist() == [0, 0]
    assert (grad[:, 1] > 0).all()


def test_confident_rows_keep_their_digits(device: Device) -> None:
    """A target far ahead: 1 - softmax and the loss are some e^-30, not a difference of rounded
    ones."""
    for v in (10, 5000):
        logits = torch.zeros(2, v)
        logits[:, 3] = 30.0
        leaf = logits.requires_grad_()
        truth = logits.detach().double().requires_grad_()
        loss = cross_entropy(leaf, torch.tensor([3, 3]), config=CPP)
        exact = plain_torch_cross_entropy(truth, torch.tensor([3, 3]))
        torch.autograd.backward((loss, exact))
        assert leaf.grad is not None
        assert truth.grad is not None
        expected = (v - 1) * 2.718281828459045**-30
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert leaf.grad[0, 3].item() == pytest.approx(-expected / 2, rel=1e-5)


@pytest.mark.parametrize("v", [10, 2000])
@pytest.mark.parametrize("rows", [0, 4])
def test_batches_without_a_valid_row(device: Device, rows: int, v: int) -> None:
    logits = torch.full((rows, v), torch.nan)
    targets = torch.full((rows,), -100)
    meter = Meter("cpu")
    expected = Meter("cpu")
    grad = cross_entropy_step(logits, targets, meter, config=CPP)
    cross_entropy_step(logits, targets, expected, config=EAGER)
    assert not grad.any()
    assert torch.equal(meter.counts, expected.counts)
    assert torch.equal(meter.sums, expected.sums)
    assert cross_entropy(logits, targets, config=CPP).isnan()
    assert cross_entropy(logits, targets, reduction="sum", config=CPP).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_numbers_as_tensors_are_read_by_the_kernel(device: Device, dtype: torch.dtype) -> None:
    logits, targets = arguments(6, 40)
    numbers = {"label_smoothing": 0.25, "z_loss": 0.5, "normalizer": 3.0, "grad_scale": 1024.0}
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in numbers.items()}
    expected = cross_entropy_step(logits, targets, None, **numbers, config=CPP)
    assert torch.equal(cross_entropy_step(logits, targets, None, **tensors, config=CPP), expected)


def test_more_k_than_a_launch_counts_are_refused(device: Device) -> None:
    logits, targets = arguments(2, 40)
    cross_entropy_step(logits, targets, Meter("cpu", topk=range(1, 17)), config=CPP)
    with pytest.raises(ValueError, match="up to 16 k, got 17"):
        cross_entropy_step(logits, targets, Meter("cpu", topk=range(1, 18)), config=CPP)


def logprob_results(
    logits: Tensor, targets: Tensor, config: KernelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and the gradient of a sum of both."""
    leaf = logits.detach().requires_grad_()
    results = token_logprobs(leaf, targets, temperature=0.7, entropy=True, config=config)
    weights = [torch.linspace(-1.0, 2.0, len(targets)) + shift for shift in (0.0, 0.5)]
    (grad,) = torch.autograd.grad(
        results, leaf, [w.to(r.dtype) for w, r in zip(weights, results, strict=True)]
    )
    return *(r.detach() for r in results), grad


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_of_rows_of_every_kind_agree_with_float64(
    device: Device, dtype: torch.dtype, backwards: bool
) -> None:
    device("twice", backwards)
    for v in (1, 9, 257, 1024, 1025, 3001):
        logits, targets = arguments(5, v, dtype, seed=v)
        odd = torch.nn.functional.pad(logits, (1, 2))[:, 1:-2]  # rows begin and end anywhere
        truth = logprob_results(logits.double(), targets, EAGER)
        eager = logprob_results(logits, targets, EAGER)
        for actual in (logprob_results(x, targets, CPP) for x in (logits, odd)):
            for ours, theirs, true in zip(actual, eager, truth, strict=True):
                assert_no_worse_than_eager(ours, theirs, true)


@pytest.mark.parametrize("v", [3, 2000])
def test_bad_targets_have_no_log_probability_and_no_gradient(device: Device, v: int) -> None:
    """Nothing looks at the targets before, as on a GPU."""
    logits, _ = arguments(4, v)
    targets = torch.tensor([-1, 1, v, -100])
    results = [torch.empty(4), torch.empty(4), torch.empty(4, 2)]
    torch.ops.esper.token_logprobs.default(logits, targets, -100, 1.0, 0, *results)
    for values in results[:2]:
        assert values.isnan().tolist() == [True, False, True, False]
        assert values[3] == 0
    grad = torch.full_like(logits, 7.0)
    torch.ops.esper.token_logprobs_backward.default(
        logits, targets, -100, 1.0, 0, *results[1:], torch.ones(4), torch.ones(4), grad
    )
    assert not grad[[0, 2, 3]].any()
    assert grad[1].all()


@pytest.mark.parametrize(
    "count", [0, 1, 111, 321, *(pytest.param(n, marks=pytest.mark.slow) for n in (771, 2241))]
)
def test_gradient_statistics_of_any_number_of_tensors(device: Device, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    grads: list[Tensor | None] = []
    for i in range(count):
        size = (1, 0, 37, 4097, 16)[i % 5] + i % 7 * (i % 5 != 1)
        grads.append(
            None
            if i % 31 == 7
            else torch.randn(size, generator=generator).to(DTYPES[i % 3])[i % 2 :]
        )
    if count > 1:
        grads[1] = torch.randn(150_001, generator=generator)  # several pieces, odd ends
        grads[-1] = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-45])
    scales = [None, torch.tensor(0.25), torch.tensor(-1e-3, dtype=torch.float64)]
    if count == 111:
        scales += [
            torch.tensor(x, dtype=torch.float64)
            for x in (0.0, torch.inf, torch.nan, 1e-200, -1e200)
        ]
    for scale in scales:
        actual = grad_stats(grads, inv_scale=scale, config=CPP)
        expected = grad_stats(grads, inv_scale=scale, config=EAGER)
        for name in ("zeros", "nans", "infs", "found_inf"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name
        for name in ("norms", "max_abs", "total_norm"):
            a = getattr(actual, name)
            b = getattr(expected, name)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_statistics_of_tensors_that_blocks_share(
    device: Device, dtype: torch.dtype, backwards: bool
) -> None:
    """The runs of a tensor begin and end anywhere, and are longer and shorter than a trip of the
    loop."""
    device("whole", backwards)
    generator = torch.Generator().manual_seed(0)
    rare = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 1e-45, 3e38])
    for offset, size in ((0, 8192 * 13), (1, 8192 * 13), (3, 100_003), (5, 8191), (7, 8193)):
        plain = torch.randn(offset + size, generator=generator).to(dtype)[offset:]
        odd = plain.clone()
        odd[torch.randint(size, (9,), generator=generator)] = 0.0
        odd[torch.randint(size, (7,), generator=generator)] = rare.to(dtype)
        grads = [plain, odd, plain[: size // 3], None, odd[1 : size // 2]]
        actual = grad_stats(grads, config=CPP)
        expected = grad_stats(grads, config=EAGER)
        assert torch.equal(actual.counts, expected.counts)
        torch.testing.assert_close(
            actual.magnitudes, expected.magnitudes, rtol=1e-12, atol=0, equal_nan=True
        )


def test_the_table_of_gradients_is_filled_only_when_one_has_moved(
    device: Device, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.zeros(0), torch.ones(2)]
    tables = native_grad_stats.new_tables(len(grads), torch.device("cpu"))
    monkeypatch.setattr(native_grad_stats, "_tables", lambda stats: tables)
    stats = grad_stats(grads, config=CPP)
    assert stats.norms.tolist() == [5, 0, 2**0.5]

    on_device = tables[0]
    address = on_device.view(-1)[:2]
    address.copy_(on_device.view(-1)[8:10])  # a stranger: the first tensor is now the last
    assert grad_stats(grads, out=stats, config=CPP).norms.tolist() == [2**0.5, 0, 2**0.5]
    library.esper_shim_capture(True)
    before = [table.clone() for table in tables]
    captured = grad_stats(grads, config=CPP)
    library.esper_shim_capture(False)
    assert captured.norms.tolist() == [5, 0, 2**0.5]  # by a table of its own
    assert all(torch.equal(a, b) for a, b in zip(before, tables, strict=True))

    grads[2] = torch.tensor([6.0, 8.0])
    assert grad_stats(grads, out=stats, config=CPP).norms.tolist() == [5, 0, 10]


def test_tables_of_another_size_are_refused(device: Device) -> None:
    outputs = (
        torch.empty(2, 1, dtype=torch.float64),
        torch.empty(3, 1, dtype=torch.int64),
        torch.empty((), dtype=torch.float64),
        torch.empty(()),
    )
    tables = native_grad_stats.new_tables(1, torch.device("cpu"))
    for wrong in ((tables[0][:1], tables[1]), (tables[0], None), (tables[0].float(), tables[1])):
        with pytest.raises(ValueError, match=r"esper: expected (a table|both tables)"):
            torch.ops.esper.grad_stats.default([torch.ones(2)], None, 0, *outputs, *wrong)


def test_why_the_kernels_cannot_run_is_a_constant_to_compilers() -> None:
    reason = native.cuda_unavailable()
    if torch.version.cuda is None:
        assert reason == f"torch {torch.__version__} is built without CUDA"

    def function(x: Tensor) -> Tensor:
        return x + 1 if native.cuda_unavailable() is None else x + 2

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == (1 if reason is None else 2)


def check_measures(logits: Tensor, targets: Tensor, **options: Any) -> None:
    """Compare the measures of the loss and of a step in place with the definition in float64."""
    v = logits.shape[-1]
    plans: list[dict[str, Any]] = [
        {"per_class": v, "calibration_bins": 10, "entropy": True},
        {"calibration_bins": 7},
        {"entropy": True, "per_class": min(v, 1024) if v <= 1024 else 0, "confusion": v <= 1024},
    ]
    for plan in plans:
        truth = Meter("cpu", **plan)
        meters = [truth.empty_copy() for _ in range(2)]
        for softcap in (None, 4.0):
            more = {**options, "softcap": softcap}
            cross_entropy(logits.double(), targets, **more, meter=truth, config=EAGER)
            cross_entropy(logits, targets, **more, meter=meters[0], config=CPP)
            place = logits.clone()
            cross_entropy_step(place, targets, meters[1], **more, inplace=True, config=CPP)
        for meter in meters:
            assert torch.equal(meter.counts, truth.counts)
            torch.testing.assert_close(meter.sums[3:], truth.sums[3:], rtol=1e-5, atol=1e-6)
            assert meter.ticket.item() == 0


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measures_of_rows_of_every_kind_agree_with_float64(
    device: Device, name: str, dtype: torch.dtype
) -> None:
    """Rows begin and end anywhere, and their largest logits are tied across threads."""
    device(name)
    for v in (1, 2, 13, 257, 1100, 3001):
        logits, targets = arguments(6, v, dtype, seed=v)
        logits[1] = logits[1].round()
        logits[2] = 0
        logits[3, v // 3 :: max(1, v // 3)] = 20  # also in the ragged ends of the row
        logits[4, ::2] = -torch.inf
        check_measures(torch.nn.functional.pad(logits, (1, 2))[:, 1:-2], targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measures_of_rows_of_every_size_agree_with_float64(
    device: Device, name: str, dtype: torch.dtype
) -> None:
    device(name, backwards=True)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    for v, rows in ((7, 700), (10, 300), (33, 60), (256, 9), (1000, 5), (10000, 3), (50257, 2)):
        logits, targets = arguments(rows, v, dtype, seed=v)
        check_measures(logits, targets, weight=torch.linspace(0.5, 2.0, v), **options)


def test_measures_take_no_launch_of_their_own(device: Device, library: Any) -> None:
    library.esper_shim_launched.restype = ctypes.c_int64
    for v in (10, 300):
        logits, targets = arguments(9, v)
        before = library.esper_shim_launched()
        meter = Meter("cpu", per_class=v, calibration_bins=15, entropy=True)
        cross_entropy_step(logits, targets, meter, config=CPP)
        assert library.esper_shim_launched() == before + 1


@pytest.mark.parametrize("v", [1, 7, 1000, 1030])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("confusion", [False, True])
def test_measures_are_those_of_eager(
    device: Device, v: int, backwards: bool, confusion: bool
) -> None:
    """The gradient is written in place; there are ties, ignored and bad targets, and rows that are
    not finite. The bits are the same in whatever order the blocks run."""
    confusion = confusion and v <= 7
    generator = torch.Generator().manual_seed(v)
    logits = torch.randn(40, v, generator=generator).mul_(3)
    logits[::3] = logits[::3].round()
    logits[1, 0], logits[2, -1], logits[3] = torch.nan, torch.inf, -torch.inf
    targets = torch.randint(v, (40,), generator=generator)
    targets[::9] = -100
    targets[5] = v
    meters = [
        Meter("cpu", per_class=v, calibration_bins=10, entropy=True, confusion=confusion)
        for _ in range(3)
    ]
    device(backwards=backwards)
    for softcap in (None, 4.0):
        cross_entropy(logits, targets, softcap=softcap, meter=meters[0], config=CPP)
        cross_entropy_step(
            logits.clone(), targets, meters[1], softcap=softcap, inplace=True, config=CPP
        )
        within = targets.where(targets != v, -100)
        cross_entropy(logits, within, softcap=softcap, meter=meters[2], config=EAGER)
    assert torch.equal(meters[0].counts, meters[1].counts)
    assert torch.equal(meters[0].sums[3:], meters[1].sums[3:])
    assert torch.equal(meters[0].counts[7:], meters[2].counts[7:])
    torch.testing.assert_close(meters[0].sums[3:], meters[2].sums[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_test_passes_on_the_simulated_gpu_under_sanitizers() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")

    def runtime(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
        "ESPER_SHIM": str(built_with_sanitizers()),
    }
    names = ("cross_entropy", "cross_entropy_step", "cross_entropy_inputs", "grad_stats", "meter")
    names += ("measures", "token_logprobs")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    for tests in (
        ["-k", "cpp and not cpp-avx2 and not cpp-baseline", "-p", "tests.cuda_shim.plugin", *files],
        ["tests/kernels/test_cuda.py"],
    ):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "(not slow or in_turn) and not long",  # of what the backends take in turn, every case
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        # in the slow part each other GPU for one source; test_packaging.py has all for sm_90
        pytest.param(source, sm, marks=pytest.mark.slow if few else pytest.mark.long)
        for source in cuda_resources.SOURCES
        for sm in (90, 80, 100)
        for few in [(source, sm) in (("token_logprobs", 80), ("grad_stats", 100))]
    ],
)
def test_kernels_compile_for_gpus_without_spilling(source: str, architecture: int) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    rows = cuda_resources.resources(source, architecture)
    kernels = {"cross_entropy": 49, "token_logprobs": 6, "grad_stats": 2}
    assert len(rows) == kernels[source]
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spilled_bytes"] == 0, row
    names = {row["kernel"] for row in recorded() if row["sm"] == architecture}
    assert {row["kernel"] for row in rows} <= names


def test_no_kernel_spills_on_any_architecture_by_the_record() -> None:
    assert {row["sm"] for row in recorded()} == set(cuda_resources.ARCHITECTURES)
    assert [row for row in recorded() if row["spilled_bytes"]] == []


def recorded() -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = json.loads(
        (ROOT / "benchmarks/results/cuda-resources.json").read_text()
    )["figures"]
    return figures
