"""Random calls of the CPU ops, with unusual memory layouts and every option, against float64.

Call i is drawn from the seed i alone, so `python tests/kernels/test_fuzz.py 1 I` repeats call I by
itself. `test_other_builds` makes many calls under the address and undefined-behaviour sanitizers.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    token_logprobs,
)
from esper_kernels.native import INSTRUCTION_SETS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# About the widths of vectors, the change to whole rows per vector at 33, and the chunks of long
# rows.
CLASSES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 129, 257, 1000)
LONG_ROWS = (1023, 1025, 2049, 4095, 4097, 9001)
SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e4, -1e4, 86.0, -86.0, 6e-8, 1e-40)
EAGER = KernelConfig(backend="eager")

Layout = Callable[[Tensor], Tensor]


# --- memory: the same values in another layout ---


def rows_apart(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2), value=7)[..., 1 : 1 + x.shape[-1]] if x.dim() else x


def first_two_swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def every_second_row(x: Tensor) -> Tensor:
    return torch.stack([x, x], -2)[..., 0, :] if x.dim() else x


def at_an_offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)


def unaligned(x: Tensor) -> Tensor:
    """A tensor whose elements begin one byte past a multiple of their size."""
    if x.numel() == 0:
        return x
    memory = bytearray(x.numel() * x.element_size() + 1)
    result = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return result.copy_(x)


def classes_apart(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() else x


def first_row_expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() > 1 and len(x) else x


def negative_bit(x: Tensor) -> Tensor:
    """A view as `.conj().imag` makes it: the memory holds the negated values."""
    return torch._neg_view(-x)


WRITABLE: tuple[Layout, ...] = (
    torch.Tensor.contiguous,
    rows_apart,
    first_two_swapped,
    every_second_row,
    at_an_offset,
    unaligned,
)
READABLE: tuple[Layout, ...] = (*WRITABLE, classes_apart, first_row_expanded, negative_bit)


# --- cross entropy ---


@dataclass(kw_only=True)
class LossCall:
    form: str  # "loss", "step", "out" or "inplace"
    logits: Tensor
    targets: Tensor
    options: dict[str, Any]
    factor: Any  # grad_output of the loss, or grad_scale
    topk: tuple[int, ...] | None  # of the meter, None without one
    out: Tensor | None
    config: KernelConfig


def draw_values(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape) * r.choice((0.1, 3.0, 30.0))
    if r.random() < 0.3:
        special = torch.tensor(r.sample(SPECIAL, 3))[torch.randint(3, shape)]
        x = x.where(torch.rand(shape) > r.choice((0.02, 0.5)), special)
    return x.to(dtype)


def maybe_tensor(r: random.Random, value: float) -> float | Tensor:
    if r.random() < 0.4:
        return value
    number = torch.tensor(value, dtype=r.choice((torch.float32, torch.float64)))
    return negative_bit(number) if r.random() < 0.1 else number


def draw_targets(r: random.Random, logits: Tensor, ignore_index: int) -> Tensor:
    shape = logits.shape[:-1]
    classes = logits.shape[-1]
    targets = torch.randint(classes, shape)
    targets = targets.where(torch.rand(shape) > 0.5, logits.argmax(-1))
    targets = targets.where(torch.rand(shape) > 0.2, ignore_index)
    if ignore_index >= 0 and classes <= 256 and r.random() < 0.5:
        targets = targets.to(torch.uint8)
    elif r.random() < 0.3:
        targets = targets.to(torch.int32)
    return r.choice((torch.Tensor.contiguous, rows_apart, at_an_offset, unaligned))(targets)


def draw_loss_call(r: random.Random) -> LossCall:
    classes = r.choice(LONG_ROWS if r.random() < 0.05 else CLASSES)
    leading = tuple(r.choice((0, 1, 2, 3, 5, 19)) for _ in range(r.choice((0, 1, 1, 1, 2, 3))))
    if classes > 1000:
        leading = (r.randint(0, 3),)
    form = r.choice(("loss", "step", "out", "inplace"))
    dtype = r.choice(DTYPES)
    logits = draw_values(r, (*leading, classes), dtype)
    logits = r.choice(WRITABLE if form == "inplace" else READABLE)(logits)
    ignore_index = r.choice((-100, 0, classes - 1))
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": r.choice(("mean", "sum", "none") if form == "loss" else ("mean", "sum")),
        "label_smoothing": maybe_tensor(r, r.choice((0.0, 0.0, 0.1, 1.0))),
        "z_loss": maybe_tensor(r, r.choice((0.0, 0.0, 1e-3))),
        "softcap": r.choice((None, None, 5.0, 30.0)),
    }
    if r.random() < 0.3:
        options["weight"] = r.choice((torch.Tensor.contiguous, at_an_offset))(torch.rand(classes))
    if options["reduction"] == "mean":
        options["normalizer"] = r.choice((None, None, 3.0, torch.tensor(3), torch.tensor(2.5), 0))
    out = None
    if form == "out":
        out = r.choice(WRITABLE)(torch.full((*leading, classes), 7.0, dtype=dtype))
    factor = r.choice((1.0, -2.0, 0.0))
    return LossCall(
        form=form,
        logits=logits,
        targets=draw_targets(r, logits, ignore_index),
        options=options,
        factor=factor if form == "loss" else maybe_tensor(r, factor),
        topk=r.choice((None, (1,), (2, 5), (1, 3, 2000))),
        out=out,
        config=KernelConfig(backend="cpp", instruction_set=r.choice(INSTRUCTION_SETS)),
    )


def loss_and_gradient(
    call: LossCall, logits: Tensor, meter: Meter | None, config: KernelConfig
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = cross_entropy(leaf, call.targets, **call.options, meter=meter, config=config)
    factor = torch.full_like(loss, float(call.factor))
    (gradient,) = torch.autograd.grad(loss, leaf, factor)
    return loss.detach(), gradient


def check_loss_call(call: LossCall) -> None:
    meter, true_meter = (
        None if call.topk is None else Meter("cpu", topk=call.topk) for _ in range(2)
    )
    before = call.logits.clone()
    true_loss, true_gradient = loss_and_gradient(call, before.double(), true_meter, EAGER)
    if call.form == "loss":
        loss, gradient = loss_and_gradient(call, call.logits, meter, call.config)
        torch.testing.assert_close(loss.double(), true_loss, rtol=3e-6, atol=2e-6, equal_nan=True)
    else:
        gradient = cross_entropy_step(
            call.logits,
            call.targets,
            meter,
            **call.options,
            grad_scale=call.factor,
            out=call.out,
            inplace=call.form == "inplace",
            config=call.config,
        )
        assert call.out is None or gradient is call.out
    if call.form != "inplace":
        torch.testing.assert_close(call.logits, before, rtol=0, atol=0, equal_nan=True)
    # With z-loss of logits about 1e4, differences of terms of size 20 cancel to 5e-6.
    rtol = max(torch.finfo(call.logits.dtype).eps, 3e-6)
    torch.testing.assert_close(
        gradient.double(), true_gradient, rtol=rtol, atol=5e-6, equal_nan=True
    )
    if meter is not None and true_meter is not None:
        torch.testing.assert_close(
            meter.sums, true_meter.sums, rtol=3e-6, atol=2e-6, equal_nan=True
        )
        assert torch.equal(meter.counts, true_meter.counts)


def check_refused_call(call: LossCall, fault: str) -> None:
    """A call that cannot be served raises an error for the caller, and writes nothing."""
    meter = Meter("cpu", topk=call.topk or (1,))
    if fault == "bad target":
        call.targets = call.targets.long().contiguous()
        if call.targets.numel() == 0:
            return
        call.targets.view(-1)[-1] = call.logits.shape[-1] + 5
    elif call.logits.numel() == 0:
        return
    else:
        call.logits = torch.empty_like(call.logits, memory_format=torch.contiguous_format)
        call.logits.untyped_storage().resize_(0)
    before = call.logits.clone() if fault == "bad target" else None
    arguments = {"out": call.out, "config": call.config, **call.options}
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        cross_entropy_step(
            call.logits, call.targets, meter, inplace=call.form == "inplace", **arguments
        )
    assert not meter.counts.any()
    if before is not None:
        torch.testing.assert_close(call.logits, before, rtol=0, atol=0, equal_nan=True)
    if call.out is not None:
        assert call.out.eq(7).all()


# --- log-probabilities ---


def check_logprobs(r: random.Random) -> None:
    classes = r.choice(LONG_ROWS if r.random() < 0.05 else CLASSES)
    leading = tuple(r.choice((0, 1, 2, 3, 5, 19)) for _ in range(r.choice((0, 1, 1, 1, 2, 3))))
    if classes > 1000:
        leading = (r.randint(0, 3),)
    logits = r.choice(READABLE)(draw_values(r, (*leading, classes), r.choice(DTYPES)))
    ignore_index = r.choice((-100, 0, classes - 1))
    targets = draw_targets(r, logits, ignore_index)
    temperature = r.choice((0.5, 1.0, 3.0))
    entropy = r.random() < 0.5
    factors = [torch.randn(targets.shape) * r.choice((0, 1)) for _ in range(1 + entropy)]
    config = KernelConfig(backend="cpp", instruction_set=r.choice(INSTRUCTION_SETS))
    found = []
    for x, c in ((logits, config), (logits.double(), EAGER)):
        leaf = x.detach().requires_grad_()
        results = token_logprobs(
            leaf,
            targets,
            temperature=temperature,
            entropy=entropy,
            ignore_index=ignore_index,
            config=c,
        )
        results = results if isinstance(results, tuple) else (results,)
        grads = [factor.to(y.dtype) for factor, y in zip(factors, results, strict=True)]
        found.append((*(y.detach() for y in results), *torch.autograd.grad(results, leaf, grads)))
    for actual, true in zip(*found, strict=True):
        rtol = max(torch.finfo(actual.dtype).eps, 3e-6)
        torch.testing.assert_close(actual.double(), true, rtol=rtol, atol=2e-5, equal_nan=True)


# --- gradient statistics ---


def draw_gradient(r: random.Random) -> Tensor | None:
    if r.random() < 0.1:
        return None
    shape = tuple(r.choice((0, 1, 2, 5, 16, 33, 130)) for _ in range(r.randint(0, 3)))
    if torch.Size(shape).numel() > 20_000:
        shape = (r.choice((16_383, 16_385)),)
    x = draw_values(r, shape, r.choice(DTYPES))
    return r.choice(READABLE)(x)


def check_grad_stats(r: random.Random) -> None:
    names = r.sample("abc", r.randint(0, 3))
    groups = {name: [draw_gradient(r) for _ in range(r.randint(0, 4))] for name in names}
    inv_scale = r.choice((None, 1.0, 0.5, -2.0, 0.0, torch.inf, torch.nan))
    scale = None if inv_scale is None else torch.tensor(inv_scale)
    config = KernelConfig(backend="cpp", instruction_set=r.choice(INSTRUCTION_SETS))
    stats = grad_stats(groups, inv_scale=scale, config=config)
    truth = grad_stats(groups, inv_scale=scale, config=EAGER)
    for name in ("norms", "total_norm", "max_abs"):
        actual = getattr(stats, name)
        expected = getattr(truth, name)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0, equal_nan=True)
    for name in ("zeros", "nans", "infs", "found_inf"):
        assert torch.equal(getattr(stats, name), getattr(truth, name)), name


# --- many of them ---


def check_call(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    kind = r.random()
    if kind < 0.2:
        check_grad_stats(r)
    elif kind < 0.4:
        check_logprobs(r)
    elif kind < 0.45:
        check_refused_call(draw_loss_call(r), r.choice(("bad target", "freed storage")))
    else:
        check_loss_call(draw_loss_call(r))


def check_calls(seeds: range) -> None:
    for seed in seeds:
        try:
            check_call(seed)
        except BaseException:
            print(f"call {seed} failed", file=sys.stderr)
            raise


def test_random_calls_agree_with_eager() -> None:
    check_calls(range(300))


if __name__ == "__main__":
    calls = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    check_calls(range(first, first + calls))
