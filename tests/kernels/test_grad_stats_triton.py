"""Properties of the Triton backend of gradient statistics alone: its tables, its pieces, its one
launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import GradStats, KernelConfig, grad_stats
from esper_kernels.ops.grad_stats import triton as host
from esper_kernels.testing import SyncCounter, grad_samples

pytest.importorskip("triton")
from esper_kernels.ops.grad_stats import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in Triton's interpreter
TRITON = KernelConfig(backend="triton")
EAGER = KernelConfig(backend="eager")
COLUMNS = ("norms", "max_abs", "zeros", "nans", "infs", "total_norm", "found_inf")


def normal(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def amid_nan(size: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Numbers, some of them 0, in memory that has NaN before and behind them."""
    memory = torch.full((size + offset + 64,), torch.nan, dtype=dtype, device=DEVICE)
    view = memory[offset : offset + size]
    return view.copy_(normal(size, dtype)).masked_fill_(view > 1, 0)


def assert_equal_to_eager(grads: Any, stats: GradStats, **options: Any) -> None:
    expected = grad_stats(grads, **options, config=EAGER)
    for name in COLUMNS:
        actual = getattr(stats, name)
        truth = getattr(expected, name)
        torch.testing.assert_close(
            actual, truth, rtol=1e-12, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_views_at_any_element_are_read_exactly(dtype: torch.dtype) -> None:
    block = host.BLOCK_BYTES // dtype.itemsize
    grads = [
        amid_nan(size, dtype, offset)
        for offset in (0, 1, 7)
        for size in (1, block - 1, block, block + 1)
    ]
    grads += [amid_nan(2 * block + 3, dtype, offset) for offset in (2, 3, 8)]
    assert_equal_to_eager(grads, grad_stats(grads, config=TRITON))


@pytest.mark.parametrize("most_pieces", [1, 5])
def test_pieces_of_several_blocks(monkeypatch: pytest.MonkeyPatch, most_pieces: int) -> None:
    monkeypatch.setattr(host, "_MOST_PIECES", most_pieces)
    grads = [
        normal(30_001),
        None,
        normal(3),
        normal(20_001, torch.bfloat16)[1:],
        normal(9_000, torch.float64),
    ]
    stats = grad_stats(grads, config=TRITON)
    assert stats.workspace["triton"].piece_blocks > 1
    assert_equal_to_eager(grads, stats)


def test_a_tensor_of_more_pieces_than_are_added_up_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grads = [normal(300 * host.BLOCK_BYTES // 4)]
    monkeypatch.setattr(host, "_MOST_PIECES", 301)
    stats = grad_stats(grads, config=TRITON)
    assert stats.workspace["triton"].partials.shape[1] == 301 > triton_kernels.LANES.value
    assert_equal_to_eager(grads, stats)


@pytest.mark.slow
def test_more_than_a_thousand_tensors() -> None:
    grads = [
        normal(1 + seed % 5, host.DTYPES[seed % 4], seed) if seed % 7 else None
        for seed in range(1_300)
    ]
    assert_equal_to_eager(grads, grad_stats(grads, config=TRITON))


@pytest.mark.parametrize("places", [[0], [1], [2], [0, 1, 2], [0, 2]], ids=str)
def test_none_and_empty_anywhere(places: list[int]) -> None:
    for absent in (None, torch.zeros(0, device=DEVICE), torch.zeros(9, device=DEVICE)[9:]):
        grads = [absent if place in places else normal(5) for place in range(3)]
        assert_equal_to_eager(grads, grad_stats(grads, config=TRITON))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, torch.inf, torch.nan])
def test_any_scale_is_multiplied_to_every_value(scale: float) -> None:
    numbers = torch.tensor([0.0, -0.0, 1e-45, 3.0, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    inv_scale = torch.tensor(scale, device=DEVICE)
    for dtype in host.DTYPES:
        grads = [
            numbers[:4].to(dtype),
            numbers[3:6].to(dtype),
            numbers.to(dtype),
            normal(5, dtype),
            None,
        ]
        stats = grad_stats(grads, inv_scale=inv_scale, config=TRITON)
        assert_equal_to_eager(grads, stats, inv_scale=inv_scale)


def test_tables_follow_gradients_that_moved() -> None:
    """`zero_grad(set_to_none=True)` moves gradients like this; first and second are alive, so their
    addresses differ."""
    first = [normal(5), None, normal(7)]
    second = [normal(5, seed=1), None, normal(7, seed=1)]
    stats = grad_stats(first, config=TRITON)
    tables = stats.workspace["triton"]
    for grads in (second, first, first):
        with SyncCounter() as syncs:
            stats = grad_stats(grads, out=stats, config=TRITON)
        assert syncs.count == 0
        assert stats.workspace["triton"] is tables
        assert_equal_to_eager(grads, stats)
    for grads in ([normal(9), normal(2), None], [normal(9, torch.float16), normal(2), None]):
        stats = grad_stats(grads, out=stats, config=TRITON)
        assert_equal_to_eager(grads, stats)


def test_a_call_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return triton_kernels_kernel[grid]

    triton_kernels_kernel = triton_kernels.kernel
    monkeypatch.setattr(triton_kernels, "kernel", Counted())
    samples = [sample for sample in grad_samples(DEVICE).values() if sample]
    for sample in samples:
        grad_stats(sample, inv_scale=torch.tensor(0.5, device=DEVICE), config=TRITON)
    assert len(launches) == len(samples)


def test_same_bits_on_every_run_and_tickets_are_back_at_zero() -> None:
    grads = [normal(70_001), normal(33, torch.bfloat16), None]
    stats = grad_stats(grads, config=TRITON)
    once = [getattr(stats, name).clone() for name in COLUMNS]
    for out in (stats, None):
        again = grad_stats(grads, out=out, config=TRITON)
        assert all(
            torch.equal(getattr(again, name), bits)
            for name, bits in zip(COLUMNS, once, strict=True)
        )
        assert again.workspace["triton"].tickets.count_nonzero() == 0


def test_dense_gradients_are_read_where_they_are() -> None:
    x = normal(120).view(2, 3, 4, 5)
    dense = [
        x,
        x.permute(3, 1, 0, 2),
        x.to(memory_format=torch.channels_last),
        x[1:, None].transpose(1, 3),
    ]
    stats = grad_stats([*dense, x[:, ::2], x.expand(2, 2, 3, 4, 5)], config=TRITON)
    found = stats.workspace["triton"].found
    assert found[:4] == [view.data_ptr() for view in dense]
    assert x.data_ptr() not in found[4:]


def test_sizes_past_32_bits_make_few_pieces() -> None:
    numels = (2**33 + 5, 1, 0, 2**31)
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.float64)
    tables = host._new_tables((numels, dtypes), torch.device("cpu"))
    first = tables.layout[8:13]
    pieces = tables.partials.shape[1]
    assert tables.layout[:4].tolist() == list(numels)
    assert first.tolist() == [
        0,
        *torch.bincount(tables.layout[13:], minlength=4).cumsum(0).tolist(),
    ]
    assert first[-1] == pieces <= 16384 + len(numels)
    for place, (numel, dtype) in enumerate(zip(numels, dtypes, strict=True)):
        room = int(first[place + 1] - first[place]) * tables.piece_blocks * host.BLOCK_BYTES
        assert max(1, numel * dtype.itemsize + 15) <= room


def test_tables_of_a_captured_graph_are_not_changed() -> None:
    first = [normal(5)]
    moved = [normal(5, seed=1)]
    stats = grad_stats(first, config=TRITON)
    stats.workspace["triton"].captured = True  # what a call inside a capture sets
    grad_stats(first, out=stats, config=TRITON)
    for grads in (moved, [normal(6)]):
        with pytest.raises(RuntimeError, match=r"CUDA graph.*call before the capture.*same out"):
            grad_stats(grads, out=stats, config=TRITON)
    assert_equal_to_eager(first, stats)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")
def test_replay_of_a_captured_graph_measures_the_gradients_of_now() -> None:
    grads = [normal(70_001), normal(33, torch.bfloat16)]
    stats = grad_stats(grads, config=TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad_stats(grads, out=stats, config=TRITON)
    for factor in (2.0, 0.25):
        for grad in grads:
            grad.mul_(factor)
        graph.replay()
        assert_equal_to_eager(grads, stats)
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grad_stats(grads, config=TRITON)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")
def test_a_tensor_past_32_bits() -> None:
    grad = torch.ones(2**32 + 3, dtype=torch.bfloat16, device=DEVICE)
    grad[-1], grad[-2] = 0, torch.inf
    stats = grad_stats([grad], config=TRITON)
    assert (stats.zeros.item(), stats.infs.item(), stats.norms.item()) == (1, 1, torch.inf)
    assert grad_stats([grad[:-2]], config=TRITON).norms.item() == pytest.approx(
        (2**32 + 1) ** 0.5, rel=1e-12
    )
