"""The compiled CPU backend on both sides of every size at which its code path changes, against
float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats, info
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.testing import plain_torch_cross_entropy, relative_error

BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
CONFIGS = [KernelConfig(backend="cpp", instruction_set=name) for name in INSTRUCTION_SETS]
# One lane per row up to 32 classes; chunks of 1024, 2048 or 4096; exponentials are kept up to
# 65536.
CLASSES = [around + by for around in (16, 32, 1024, 2048, 4096, 65536) for by in (-1, 0, 1)]


def batch(n: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * v)
    logits = (3 * torch.randn(n, v, generator=generator)).to(dtype)
    logits[0, -1] = 20.0  # the last chunk decides
    targets = torch.randint(v, (n,), generator=generator)
    targets[:2] = torch.tensor([v - 1, 0])[:n]
    return logits, targets


def truth_of(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    loss = plain_torch_cross_entropy(leaf, targets, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def correct_at(k: int, logits: Tensor, targets: Tensor) -> int:
    at_target = logits.gather(1, targets[:, None])
    before = torch.arange(logits.shape[1]) < targets[:, None]
    return int((((logits > at_target) | (before & (logits == at_target))).sum(1) < k).sum())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("v", CLASSES)
def test_class_counts(v: int, dtype: torch.dtype) -> None:
    logits, targets = batch(2 if v > 10_000 else 19, v, dtype)
    everything = {"weight": torch.linspace(0.5, 2.0, v), "label_smoothing": 0.1, "z_loss": 1e-2}
    for options in ({}, everything, {**everything, "softcap": 5.0}):
        true_loss, true_grad = truth_of(logits, targets, **options)
        for config in CONFIGS:
            meter = Meter("cpu", topk=(1, 5))
            leaf = logits.clone().requires_grad_()
            loss = cross_entropy(leaf, targets, **options, meter=meter, config=config)
            loss.backward()
            written = logits.clone()
            cross_entropy_step(written, targets, None, **options, inplace=True, config=config)
            assert relative_error(loss, true_loss) <= 2e-6, config
            for grad in (leaf.grad, written):
                assert grad is not None
                assert relative_error(grad, true_grad) <= BOUNDS[dtype], config
            assert meter.compute().correct == {k: correct_at(k, logits, targets) for k in (1, 5)}, (
                config
            )


@pytest.mark.parametrize("hidden", [slice(0, 4100), slice(4000, 8200), slice(4900, 9000)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_of_minus_infinity(hidden: slice, smoothing: float) -> None:
    """Masking part of a vocabulary makes such rows. With smoothing their loss is infinite, but
    their gradient is finite."""
    logits, targets = batch(5, 9000)
    logits[1:, hidden] = -torch.inf
    targets[1:] = logits[1].isfinite().nonzero()[[0, 1, -2, -1], 0]
    options = {"weight": torch.linspace(0.5, 2.0, 9000), "label_smoothing": smoothing}
    found = []
    for x, config in [
        (logits.double(), KernelConfig(backend="eager")),
        *((logits, config) for config in CONFIGS),
    ]:
        leaf = x.clone().requires_grad_()
        losses = cross_entropy(leaf, targets, **options, reduction="none", config=config)
        losses.backward(torch.ones_like(losses))
        assert leaf.grad is not None
        found.append((losses.detach().double(), leaf.grad))
    (true_losses, true_grad), *others = found
    assert true_losses[1:].isinf().all() == (smoothing > 0)
    for losses, grad in others:
        torch.testing.assert_close(losses, true_losses, rtol=2e-6, atol=1e-7)
        assert relative_error(grad, true_grad) <= 3e-6


@pytest.mark.parametrize(
    ("v", "dtype"),
    [(1023, torch.float32), pytest.param(2048, torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
def test_outputs_about_16_mib(v: int, dtype: torch.dtype) -> None:
    """Larger ones are stored past the caches, from the first aligned address of each row on."""
    most = (16 << 20) // (v * dtype.itemsize)
    logits, targets = batch(most + 1, v, dtype)
    _, truth = truth_of(logits, targets, reduction="sum")

    def check(grad: Tensor, config: KernelConfig) -> None:
        rtol = torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6
        torch.testing.assert_close(
            grad.double(), truth[: len(grad)], rtol=rtol, atol=1e-7, msg=lambda m: f"{config} {m}"
        )

    for config in CONFIGS:
        for n, offset in ((most, 0), (most + 1, 1)):
            guarded = torch.full((offset + n * v + 1,), 7.0, dtype=dtype)
            out = guarded[offset:-1].view(n, v)
            cross_entropy_step(
                logits[:n], targets[:n], None, reduction="sum", out=out, config=config
            )
            check(out, config)
            assert guarded[:offset].eq(7).all()
            assert guarded[-1] == 7
        leaf = logits.clone().requires_grad_()
        cross_entropy(leaf, targets, reduction="sum", config=config).backward()
        assert leaf.grad is not None
        check(leaf.grad, config)


@pytest.mark.parametrize(
    ("v", "rows"), [(1, (65535, 65536, 65537)), (3, (21845, 21846)), (257, (255, 256))]
)
@pytest.mark.usefixtures("threads")
def test_batches_about_65536_elements(v: int, rows: tuple[int, ...]) -> None:
    """Smaller ones are computed by one thread."""
    for n in rows:
        logits, targets = batch(n, v)
        true_loss, true_grad = truth_of(logits, targets, label_smoothing=0.1)
        for config in CONFIGS:
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                meter = Meter("cpu")
                leaf = logits.clone().requires_grad_()
                loss = cross_entropy(leaf, targets, label_smoothing=0.1, meter=meter, config=config)
                loss.backward()
                assert leaf.grad is not None
                found.append((loss.detach(), leaf.grad, meter.sums, meter.counts))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (config, n)
            torch.testing.assert_close(found[0][0].double(), true_loss, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(found[0][1].double(), true_grad, rtol=3e-6, atol=1e-10)
            assert meter.compute().correct[1] == correct_at(1, logits, targets)


@pytest.mark.parametrize(
    "sizes",
    [(n,) for n in (15, 16, 17, 31, 32, 33, 16383, 16384, 16385, 65535, 65536, 65537)]
    + [(65536, 1), (1, 65536), (65535, 1, 65537), (16384,) * 9, (100,) * 1500, (200_001, 0, 3)],
    ids=lambda sizes: f"{len(sizes)} of {max(sizes)}",
)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.usefixtures("threads")
def test_grad_stats_about_their_pieces_and_shares(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Pieces of 16384 elements, shares of 65536 among the threads."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(sizes), generator=generator).to(dtype)
    values[-1] = 0.0
    grads = list(values.split(list(sizes)))
    flat = [grad.double() for grad in grads]
    for config in CONFIGS:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(grad_stats(grads, config=config))
        one, other = found
        assert torch.equal(one.norms, other.norms)
        assert torch.equal(one.total_norm, other.total_norm)
        torch.testing.assert_close(
            one.norms, torch.stack([x.norm() for x in flat]), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(one.total_norm, values.double().norm(), rtol=1e-12, atol=0)
        assert one.max_abs.tolist() == [x.abs().max().item() if len(x) else 0 for x in flat]
        assert one.zeros.tolist() == [int((x == 0).sum()) for x in flat]


def test_info_names_the_instruction_sets_of_this_machine() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo here")
    has = set(flags.read_text(encoding="utf-8").split())
    avx2 = {"avx2", "fma", "bmi2", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {"avx512bf16": avx512 | {"avx512_bf16"}, "avx512": avx512, "avx2": avx2}
    needs |= {"baseline": set()}
    names = tuple(name for name, wanted in needs.items() if wanted <= has)
    assert info().instruction_sets == INSTRUCTION_SETS == names
    assert f"CPU kernels: {', '.join(names)}\n" in str(info())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.instruction_set)
@pytest.mark.parametrize("shape", [(4, 10, 3), (2, 40, 3, 5), (3, 5000, 2)], ids=str)
def test_classes_in_the_second_dimension(shape: tuple[int, ...], config: KernelConfig) -> None:
    """Torch's layout: classes that are moved to the end are not contiguous, so they are copied."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator, requires_grad=True)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    meter = Meter("cpu")
    cross_entropy(scores.movedim(1, -1), targets, meter=meter, config=config).backward()
    exact = scores.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, targets)
    loss.backward()
    assert scores.grad is not None
    assert exact.grad is not None
    assert meter.compute().loss == pytest.approx(loss.item(), rel=2e-6)
    assert relative_error(scores.grad, exact.grad) < 3e-6
    grad = cross_entropy_step(scores.detach().movedim(1, -1), targets, None, config=config)
    assert relative_error(grad, exact.grad.movedim(1, -1)) < 3e-6
