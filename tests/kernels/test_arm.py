"""The CPU kernels on aarch64: compiled by a cross compiler, and run by an emulator on the samples
of `esper_kernels.testing`. `make test-arm` runs this file."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, grad_stats
from esper_kernels.config import DTYPES
from esper_kernels.testing import (
    CrossEntropySample,
    cross_entropy_samples,
    grad_samples,
    plain_torch_cross_entropy,
    relative_error,
)
from tests.helpers.builds import KERNELS, ROOT

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"
NUMBERS = ("label_smoothing", "z_loss", "softcap", "normalizer")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-DESPER_TESTING")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def array(x: Tensor | bytes) -> bytes:
    """The number of bytes, then the bytes."""
    data = x if isinstance(x, bytes) else bytes(x.contiguous().view(-1).view(torch.uint8).numpy())
    return len(data).to_bytes(8, "little") + data


def numbers(*values: float) -> bytes:
    return array(torch.tensor(values, dtype=torch.float64))


def integers(*values: int) -> bytes:
    return array(torch.tensor(values, dtype=torch.int64))


def of_cross_entropy(sample: CrossEntropySample, dtype: torch.dtype) -> bytes:
    """A record of tests/helpers/samples.cpp. The truth is torch's own loss in float64; errors may
    be twice those of torch in the sample's dtype, plus 1e-6."""
    options = sample.options
    logits, targets = sample.logits.reshape(-1, sample.logits.shape[-1]), sample.targets.reshape(-1)

    def loss_and_gradient(as_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logits.to(as_dtype).requires_grad_()
        loss = plain_torch_cross_entropy(x, targets, **options)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    loss, gradient = loss_and_gradient(torch.float64)
    meter = Meter("cpu")
    cross_entropy(logits, targets, **options, meter=meter, config=KernelConfig(backend="eager"))
    bound = 2 * relative_error(loss_and_gradient(dtype)[1], gradient) + 1e-6
    weight = options.get("weight")
    return b"".join(
        [
            array(b"cross_entropy"),
            array(f"{sample.name}, {dtype}".encode()),
            integers(*logits.shape, DTYPES.index(dtype), options.get("ignore_index", -100)),
            numbers(*(float(options.get(name) or 0) for name in NUMBERS)),
            array(logits),
            array(targets),
            array(b"" if weight is None else weight),
            array(loss.double()),
            array(gradient),
            array(meter.counts),
            numbers(2e-6, bound),
        ]
    )


def of_gradients(name: str, grads: list[Tensor]) -> bytes:
    stats = grad_stats(grads, config=KernelConfig(backend="eager"))
    return b"".join(
        [
            array(b"grad_stats"),
            array(name.encode()),
            integers(*(DTYPES.index(x.dtype) for x in grads)),
            *(array(x) for x in grads),
            array(stats.norms),
            array(torch.cat([stats.zeros, stats.nans, stats.infs])),
        ]
    )


def records() -> Iterator[bytes]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sample in cross_entropy_samples(dtype):
            if sample.targets.numel():  # without rows the mean is NaN, and torch's has no gradient
                yield of_cross_entropy(sample, dtype)
    for name, grads in grad_samples().items():
        served = [x for x in grads if x is not None and x.dtype != torch.float64 and x.numel()]
        if served:
            yield of_gradients(name, served)
    yield array(b"end")


def test_kernels_on_aarch64(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} here")
    program = tmp_path / "samples"
    sources = [ROOT / "tests/helpers/samples.cpp", *KERNELS]
    command = [COMPILER, *OPTIONS, "-static", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but there is no {EMULATOR} here to run it")
    samples = tmp_path / "samples.bin"
    samples.write_bytes(b"".join(records()))
    done = subprocess.run([EMULATOR, program, samples], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to float16: wrong 0" in done.stdout  # the last check
