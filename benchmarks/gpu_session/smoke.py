"""Each GPU backend against eager torch, then the same bits from 2000 repeats and 500 replays of a
CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy_step
from esper_kernels.backends import refusal
from esper_kernels.testing import assert_no_worse_than_eager, plain_torch_cross_entropy
from esper_train.train.capture import CudaGraphs

SHAPES = ((64, 10), (512, 1000), (256, 8192), (64, 50257), (64, 128256), (64, 262144))
DTYPES = (torch.bfloat16, torch.float32)
REPEATS = 2000
REPLAYS = 500
EAGER = KernelConfig(backend="eager")
WORDS = {2: torch.int16, 4: torch.int32}  # to compare bits, by the size of an element


def compare(logits: Tensor, targets: Tensor, backend: str, repeats: int, replays: int) -> None:
    """Raise AssertionError with the first thing that is wrong. logits [N, V]; no replays on the
    CPU."""
    config = KernelConfig(backend=backend)
    device = logits.device
    expected = Meter(device, topk=(5,))
    meter = Meter(device, topk=(5,))
    eager = cross_entropy_step(logits, targets, expected, config=EAGER)
    first = cross_entropy_step(logits, targets, meter, config=config)
    leaf = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(plain_torch_cross_entropy(leaf, targets), leaf)
    assert_no_worse_than_eager(first, eager, truth)
    torch.testing.assert_close(
        meter.counts, expected.counts, rtol=0, atol=0, msg="counts differ from eager's"
    )
    torch.testing.assert_close(meter.sums, expected.sums, rtol=1e-5, atol=0)

    counts = meter.counts.clone()
    sums = meter.sums.clone()
    out = torch.empty_like(logits)
    different = torch.zeros((), dtype=torch.int64, device=device)
    words = WORDS[logits.element_size()]

    def again() -> None:
        meter.reset()
        cross_entropy_step(logits, targets, meter, out=out, config=config)
        bits_differ = (out.view(words) != first.view(words)).any()
        different.add_(bits_differ | (meter.sums != sums).any() | (meter.counts != counts).any())

    for _ in range(repeats):
        again()
    assert int(different) == 0, f"{int(different)} of {repeats} repeats gave other bits"
    if replays:
        replay = CudaGraphs(device).record(again)
        for _ in range(replays):
            replay()
        assert int(different) == 0, f"{int(different)} of {replays} replays gave other bits"
    meter.reset()
    for _ in range(10):
        cross_entropy_step(logits, targets, meter, out=out, config=config)
    assert meter.counts.equal(10 * counts), (
        "the counts of 10 equal batches are not 10 times those of one"
    )
    assert int(meter.ticket) == 0, f"the ticket is {int(meter.ticket)} between launches"


def sample(device: str, dtype: torch.dtype, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits and targets, one of them ignored."""
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[rows // 2] = -100
    return (torch.randn(rows, classes, generator=generator) * 3).to(dtype).to(device), targets.to(
        device
    )


def results() -> Iterator[tuple[str, bool]]:
    """A line for every backend, dtype and shape, and whether all was well."""
    for backend in ("triton", "cuda"):
        why = refusal("cross_entropy", backend, "cuda")
        if why is not None:
            yield f"{backend}: cannot serve: {why}", False
            continue
        for dtype in DTYPES:
            for shape in SHAPES:
                title = f"{backend} {str(dtype).removeprefix('torch.')} {shape[0]} x {shape[1]}"
                try:
                    compare(*sample("cuda", dtype, *shape), backend, REPEATS, REPLAYS)
                    yield f"{title}: ok", True
                except Exception as error:  # the other shapes are looked at too
                    yield f"{title}: {type(error).__name__}: {' '.join(str(error).split())}", False


def main() -> None:
    good = True
    for line, passed in results():
        print(line, flush=True)
        good &= passed
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
