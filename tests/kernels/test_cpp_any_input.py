"""The compiled CPU backend on inputs that Hypothesis makes up, against the definition in
float64."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats
from esper_kernels.native import INSTRUCTION_SETS

INF = math.inf
NAN = math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FINITE = (0.0, -0.0, 1.0, 2.5, -3.0, 1e4, -1e4)
VALUES = (*FINITE, INF, -INF, NAN)
EAGER = KernelConfig(backend="eager")


def rows_apart(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2), value=NAN)[..., 1 : 1 + x.shape[-1]]


def first_swapped(x: Tensor) -> Tensor:
    return (
        x
        if x.dim() < 3
        else x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    )


def odd_offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x], -2)[..., 0, :]


def classes_apart(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def one_for_all(x: Tensor) -> Tensor:
    return x if x.dim() < 2 or x.shape[0] == 0 else x[:1].expand(x.shape)


WRITABLE = (torch.Tensor.contiguous, rows_apart, first_swapped, odd_offset, every_second)
LAYOUTS = (*WRITABLE, classes_apart, one_for_all)


class Call(NamedTuple):
    form: str
    logits: Tensor
    targets: Tensor
    options: dict[str, Any]
    factor: float  # grad_output, or grad_scale
    instruction_set: str
    topk: tuple[int, ...]
    out_layout: Callable[[Tensor], Tensor]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    form = draw(st.sampled_from(("autograd", "step", "out", "inplace")))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (
        *draw(st.lists(st.integers(0, 3), max_size=3)),
        draw(st.sampled_from((1, 2, 3, 16, 17, 32, 33, 40))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    values = draw(st.sampled_from((VALUES, FINITE)))  # long rows of the first are seldom finite
    pool = torch.tensor(
        draw(st.lists(st.sampled_from(values), min_size=1, max_size=8)), dtype=dtype
    )
    logits = pool[torch.randint(len(pool), shape, generator=generator)]
    logits = draw(st.sampled_from(WRITABLE if form == "inplace" else LAYOUTS))(logits)

    target_dtype = draw(st.sampled_from((torch.int64, torch.int32, torch.uint8)))
    ignore_index = draw(st.sampled_from((0, 1) if target_dtype == torch.uint8 else (-100, 0, 1)))
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets = targets.where(torch.rand(shape[:-1], generator=generator) > 0.5, logits.argmax(-1))
    targets = targets.where(torch.rand(shape[:-1], generator=generator) > 0.2, ignore_index).to(
        target_dtype
    )
    if draw(st.booleans()):
        targets = torch.stack([targets, targets], -1)[..., 0]

    options: dict[str, Any] = {"ignore_index": ignore_index}
    options["reduction"] = draw(
        st.sampled_from(("mean", "sum", "none") if form == "autograd" else ("mean", "sum"))
    )
    options["label_smoothing"] = draw(st.sampled_from((0.0, 0.1, 1.0, torch.tensor(0.25))))
    options["z_loss"] = draw(st.sampled_from((0.0, 1e-3, torch.tensor(1e-3))))
    options["softcap"] = draw(st.sampled_from((None, 5.0)))
    if draw(st.booleans()):
        options["weight"] = torch.rand(shape[-1], generator=generator)
    if options["reduction"] == "mean":
        options["normalizer"] = draw(st.sampled_from((None, None, 3.0, torch.tensor(3), 0)))
    factor = draw(st.sampled_from((1.0, -2.0, 0.0)))
    instruction_set = draw(st.sampled_from(INSTRUCTION_SETS))
    topk = draw(st.sampled_from(((1,), (2, 5))))  # the first alone is found by a shorter way
    return Call(
        form,
        logits,
        targets,
        options,
        factor,
        instruction_set,
        topk,
        draw(st.sampled_from(WRITABLE)),
    )


def loss_and_grad(
    call: Call, logits: Tensor, meter: Meter, config: KernelConfig
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = cross_entropy(leaf, call.targets, **call.options, meter=meter, config=config)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, call.factor))
    return loss.detach(), grad


@settings(max_examples=400)
@given(calls())
def test_cross_entropy_is_its_definition(call: Call) -> None:
    meter = Meter("cpu", topk=call.topk)
    true_meter = Meter("cpu", topk=call.topk)
    true_loss, true_grad = loss_and_grad(call, call.logits.double(), true_meter, EAGER)
    config = KernelConfig(backend="cpp", instruction_set=call.instruction_set)
    before = call.logits.clone()
    if call.form == "autograd":
        loss, grad = loss_and_grad(call, call.logits, meter, config)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), true_loss, rtol=2e-6, atol=1e-6, equal_nan=True)
    else:
        out = call.out_layout(
            torch.full_like(call.logits, 7.0, memory_format=torch.contiguous_format)
        )
        memory = {"step": {}, "out": {"out": out}, "inplace": {"inplace": True}}[call.form]
        grad = cross_entropy_step(
            call.logits,
            call.targets,
            meter,
            **call.options,
            grad_scale=call.factor,
            **memory,
            config=config,
        )
        assert call.form != "out" or grad is out
        assert call.form != "inplace" or grad.data_ptr() == call.logits.data_ptr()
    if call.form != "inplace":
        torch.testing.assert_close(call.logits, before, rtol=0, atol=0, equal_nan=True)
    # Differences of two terms of size 20 (z-loss of logits 1e4) cancel to 5e-6 at worst.
    tolerance = {"rtol": torch.finfo(call.logits.dtype).eps, "atol": 5e-6}
    torch.testing.assert_close(grad.double(), true_grad, **tolerance, equal_nan=True)
    torch.testing.assert_close(meter.sums, true_meter.sums, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(meter.counts, true_meter.counts)


GRADIENTS = (0.0, -0.0, 1.0, -2.5, 1e4, 65504.0, 1e-7, 6e-8, INF, -INF, NAN)


@st.composite
def gradients(draw: st.DrawFn) -> Tensor | None:
    if draw(st.integers(0, 5)) == 0:
        return None
    shape = draw(st.lists(st.sampled_from((0, 1, 2, 5, 16, 33)), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    pool = torch.tensor(draw(st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=8)))
    x = pool.to(draw(st.sampled_from(DTYPES)))[torch.randint(len(pool), shape, generator=generator)]
    return draw(st.sampled_from(LAYOUTS if shape else (odd_offset,)))(x)


@settings(max_examples=300)
@given(
    groups=st.dictionaries(st.sampled_from("abc"), st.lists(gradients(), max_size=5), max_size=3),
    inv_scale=st.sampled_from((None, 1.0, 0.5, -2.0, 0.0, INF, NAN)),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
)
@example(
    groups={"a": [torch.full((5,), 1e-45)]}, inv_scale=2.0**-16, instruction_set=INSTRUCTION_SETS[0]
)
def test_grad_stats_are_plain_torchs_in_float64(
    groups: dict[str, list[Tensor | None]], inv_scale: float | None, instruction_set: str
) -> None:
    scale = None if inv_scale is None else torch.tensor(inv_scale)
    config = KernelConfig(backend="cpp", instruction_set=instruction_set)
    stats = grad_stats(groups, inv_scale=scale, config=config)
    tensors = [x for members in groups.values() for x in members]
    flat = [torch.zeros(0).double() if x is None else x.double().flatten() for x in tensors]
    flat = [x if scale is None else x * scale.double() for x in flat]
    everything = torch.cat([torch.zeros(0).double(), *flat])

    def assert_equal(actual: Tensor, values: list[Any], rtol: float = 0.0) -> None:
        torch.testing.assert_close(
            actual, torch.tensor(values, dtype=actual.dtype), rtol=rtol, atol=0, equal_nan=True
        )

    assert_equal(stats.norms, [x.norm().item() for x in flat], rtol=1e-12)
    assert_equal(stats.max_abs, [x.abs().max().item() if len(x) else 0 for x in flat], rtol=1e-15)
    assert_equal(stats.zeros, [int((x == 0).sum()) for x in flat])
    assert_equal(stats.nans, [int(x.isnan().sum()) for x in flat])
    assert_equal(stats.infs, [int(x.isinf().sum()) for x in flat])
    assert_equal(stats.total_norm[None], [everything.norm().item()], rtol=1e-12)
    assert stats.found_inf.item() == float(not everything.isfinite().all())

    health = stats.compute()
    assert (health.elements, health.nan_count) == (len(everything), int(everything.isnan().sum()))
    assert list(health.groups) == list(groups)
    for name, members in groups.items():
        alone = grad_stats(members, inv_scale=scale, config=config).compute()
        assert repr(health.groups[name]) == repr(alone)  # NaN equals NaN
