"""`check`: what every backend that can serve here answers, beside eager torch and float64."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from esper_kernels.backends import select_backend
from esper_kernels.config import BACKENDS, KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import cross_entropy, cross_entropy_step
from esper_kernels.ops.grad_stats import grad_stats
from esper_kernels.ops.linear_cross_entropy import linear_cross_entropy_step
from esper_kernels.ops.token_logprobs import token_logprobs
from esper_kernels.testing import assert_no_worse_than_eager, plain_torch_cross_entropy

# rows of every kind, ragged ones too
_SHAPES = ((64, 10), (9, 1000), (5, 4099), (3, 50257), (2, 262144))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}


def check() -> Iterator[tuple[str, bool]]:
    """(what was compared and how it went, whether it agreed), on the CPU and on the current CUDA
    device."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for config in (KernelConfig(backend=name) for name in BACKENDS if name != "eager"):
            for dtype in _DTYPES:
                try:
                    select_backend("cross_entropy", device, dtype, config)
                    select_backend("grad_stats", device, dtype, config)
                except ValueError:
                    continue  # `info` says why
                for shape in _SHAPES:
                    what = (
                        f"{device} {config.backend} {str(dtype).removeprefix('torch.')} "
                        f"{shape[0]} x {shape[1]}"
                    )
                    sample = _sample(device, dtype, *shape)
                    difference = (
                        _difference(config, *sample)
                        or _mixed_difference(config, *sample)
                        or _linear_difference(config, *sample)
                        or _logprob_difference(config, *sample)
                    )
                    yield f"{what}: {difference or 'ok'}", difference is None


def _sample(device: str, dtype: torch.dtype, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(classes)
    targets = torch.randint(classes, (rows,), generator=generator, device="cpu")
    targets[rows // 2] = -100
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float32, device="cpu")
    return (logits * 3).to(dtype).to(device), targets.to(device)


def _difference(config: KernelConfig, logits: Tensor, targets: Tensor) -> str | None:
    """The first thing in which the backend differs from eager by more than rounding."""
    meter, expected = (
        Meter(logits.device, topk=(1, 5), per_class=logits.shape[-1], entropy=True)
        for _ in range(2)
    )
    leaf = logits.double().requires_grad_()
    rival = logits.clone().requires_grad_()
    loss = cross_entropy(
        rival, targets, **_OPTIONS, meter=expected, config=KernelConfig(backend="eager")
    )
    (eager,) = torch.autograd.grad(loss, rival)
    (truth,) = torch.autograd.grad(plain_torch_cross_entropy(leaf, targets, **_OPTIONS), leaf)
    grads = [cross_entropy_step(logits, targets, meter, **_OPTIONS, config=config)]
    grads += torch.autograd.grad(cross_entropy(rival, targets, **_OPTIONS, config=config), rival)
    stats, others = (
        grad_stats([logits, None, eager], config=c) for c in (config, KernelConfig(backend="eager"))
    )
    try:
        for grad in grads:
            assert_no_worse_than_eager(grad, eager, truth)
        torch.testing.assert_close(meter.counts, expected.counts, rtol=0, atol=0)
        torch.testing.assert_close(meter.sums, expected.sums, rtol=1e-5, atol=0)
        # behind the norms
        torch.testing.assert_close(stats.pack()[3:], others.pack()[3:], rtol=0, atol=0)
        torch.testing.assert_close(stats.norms, others.norms, rtol=1e-9, atol=0)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def _mixed_difference(config: KernelConfig, logits: Tensor, targets: Tensor) -> str | None:
    """The first thing in which the step differs from eager with two targets per row."""
    options = {
        **_OPTIONS,
        "targets2": targets.roll(1),
        "share": torch.linspace(0.2, 1.0, len(targets), dtype=torch.float32, device=logits.device),
    }
    eager = KernelConfig(backend="eager")
    meters = [Meter(logits.device, topk=(1, 5)) for _ in range(3)]
    grad, rival, truth = (
        cross_entropy_step(x, targets, meter, **options, config=c)
        for x, meter, c in zip(
            (logits, logits, logits.double()), meters, (config, eager, eager), strict=True
        )
    )
    try:
        assert_no_worse_than_eager(grad, rival, truth)
        torch.testing.assert_close(meters[0].counts, meters[1].counts, rtol=0, atol=0)
        torch.testing.assert_close(meters[0].sums, meters[1].sums, rtol=1e-5, atol=0)
    except AssertionError as error:
        return "two targets: " + " ".join(str(error).split())
    return None


def _linear_difference(config: KernelConfig, logits: Tensor, targets: Tensor) -> str | None:
    """The first thing in which the linear step differs from eager, with the first 8 logits of each
    row as its hidden state."""
    hidden = logits[:, :8].detach().clone().requires_grad_()
    weight = logits.new_ones(logits.shape[1], hidden.shape[1])
    values = torch.linspace(-1.0, 1.0, weight.numel(), device=weight.device)
    weight.copy_(values.view_as(weight)).requires_grad_()
    meters = [Meter(logits.device, topk=(1, 5)) for _ in range(2)]
    actual, expected = (
        linear_cross_entropy_step(hidden, weight, targets, meter, **_OPTIONS, config=c)
        for meter, c in zip(meters, (config, KernelConfig(backend="eager")), strict=True)
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = plain_torch_cross_entropy(exact[0] @ exact[1].t(), targets, **_OPTIONS)
    truth = torch.autograd.grad(loss, exact)
    try:
        for ours, eager, true in zip(actual[:2], expected[:2], truth, strict=True):
            assert ours is not None
            assert eager is not None
            assert_no_worse_than_eager(ours, eager, true)
        torch.testing.assert_close(meters[0].counts[:4], meters[1].counts[:4], rtol=0, atol=0)
        torch.testing.assert_close(meters[0].sums, meters[1].sums, rtol=1e-2, atol=0)
    except AssertionError as error:
        return "linear: " + " ".join(str(error).split())
    return None


def _logprob_difference(config: KernelConfig, logits: Tensor, targets: Tensor) -> str | None:
    """The first thing in which log-probabilities, entropies or their gradient differ from eager."""
    found = []
    for x, c in (
        (logits, config),
        (logits, KernelConfig(backend="eager")),
        (logits.double(), KernelConfig(backend="eager")),
    ):
        leaf = x.detach().requires_grad_()
        results = token_logprobs(leaf, targets, temperature=0.7, entropy=True, config=c)
        (grad,) = torch.autograd.grad(results, leaf, [torch.ones_like(r) for r in results])
        found.append((*(r.detach() for r in results), grad))
    try:
        for ours, eager, true in zip(*found, strict=True):
            assert_no_worse_than_eager(ours, eager, true)
    except AssertionError as error:
        return "token_logprobs: " + " ".join(str(error).split())
    return None
