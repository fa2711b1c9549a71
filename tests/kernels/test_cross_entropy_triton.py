"""Properties of Triton's cross entropy alone: long rows, launches, what it compiles, and rows only
a GPU may see.

On a machine without a GPU the kernels run in Triton's interpreter, on the CPU.
"""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step
from esper_kernels.ops.cross_entropy import launch, reference, triton
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.testing import plain_torch_cross_entropy, relative_error

pytest.importorskip("triton")
CONFIG = KernelConfig(backend="triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = (132, 50 << 20)  # multiprocessors, bytes of cache
LONG = 16500  # classes; rows of them are read in pieces
INF = torch.inf
NAN = torch.nan


def normal(*shape: int, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(DEVICE)


def chosen(rows: int, classes: int, element_size: int = 4, burdens: int = 0) -> launch.Launch:
    return launch.choose(rows, classes, element_size, 8, burdens, *H200)


# --- rows read in pieces ---


def long_rows() -> tuple[Tensor, Tensor]:
    logits = normal(7, LONG)
    logits[0, :9000] = -INF
    logits[1] = torch.arange(LONG).remainder(7) + 1e7
    logits[2] = 0.0  # ties
    logits[3, 5000:] *= 100
    targets = torch.tensor([9500, 16000, 9000, 8191, -100, 0, LONG - 1], device=DEVICE)
    return logits, targets


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-5},
        {
            "weight": torch.linspace(0.5, 2.0, LONG),
            "label_smoothing": torch.tensor(0.1),
            "softcap": 30.0,
        },
    ],
    ids=["plain", "smoothing", "everything"],
)
def test_long_rows_agree_with_torch_in_float64(options: dict[str, Any]) -> None:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert not chosen(7, LONG).resident
    logits, targets = long_rows()
    leaf = logits.clone().requires_grad_()
    true_leaf = logits.double().requires_grad_()
    losses = cross_entropy(leaf, targets, reduction="none", config=CONFIG, **options)
    truth = plain_torch_cross_entropy(true_leaf, targets, reduction="none", **options)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    (true_grad,) = torch.autograd.grad(truth.sum(), true_leaf)
    torch.testing.assert_close(losses.detach(), truth.detach().float(), rtol=2e-6, atol=0)
    assert relative_error(grad, true_grad) < 2e-6
    step = cross_entropy_step(logits, targets, None, reduction="sum", config=CONFIG, **options)
    assert relative_error(step, true_grad) < 2e-6


@pytest.mark.parametrize("classes", [LONG, 9])
def test_pieces_count_what_the_reference_counts(classes: int) -> None:
    logits, targets = long_rows()
    logits = torch.cat([logits, logits])[:, :classes].clone()
    targets = torch.cat([targets, targets])
    targets[targets >= classes] = classes - 1
    logits[7, classes - 2], logits[8, 1], logits[9] = NAN, INF, -INF
    meters = Meter(DEVICE, topk=(5, 9000)), Meter(DEVICE, topk=(5, 9000))
    for meter, backend in zip(meters, ("triton", "eager"), strict=True):
        losses = cross_entropy(
            logits,
            targets,
            reduction="none",
            meter=meter,
            label_smoothing=0.1,
            config=KernelConfig(backend=backend),
        )
        assert losses[7:10].isnan().all()
    assert torch.equal(meters[0].counts, meters[1].counts)
    # short, row 0 is all -inf too
    assert meters[0].compute().nonfinite == (3 if classes == LONG else 4)


@pytest.mark.parametrize("classes", [LONG + 3, 21])
def test_targets_rank_behind_equal_logits_of_earlier_classes(classes: int) -> None:
    """The target lies everywhere in a word of 16 bytes, before all words and after them, from every
    phase of memory; its logit is also -inf."""
    targets = torch.tensor([0, 1, 7, 8, 9, 12, 15, 20, *range(classes - 10, classes)]).to(DEVICE)
    targets = targets.repeat(2)
    memory = torch.arange(len(targets) * classes + 1, device=DEVICE).remainder(3).float()
    logits = memory[1:].view(len(targets), classes)  # 4 bytes behind a boundary, and so on
    logits[: len(targets) // 2] = -INF
    logits[:, classes // 2] = 3.0
    topk = (1, 2, 5, 8, classes // 3, classes // 2, classes - 1)
    meters = Meter(DEVICE, topk=topk), Meter(DEVICE, topk=topk)
    for meter, backend in zip(meters, ("triton", "eager"), strict=True):
        for row, target in zip(logits, targets, strict=True):
            cross_entropy(
                row[None], target[None], meter=meter, config=KernelConfig(backend=backend)
            )
    assert torch.equal(meters[0].counts, meters[1].counts)


def test_bfloat16_logits_are_read_exactly() -> None:
    """The gradient would be rounded by Triton's interpreter, wrongly; the loss is float32."""
    for classes in (10, LONG):
        logits = normal(5, classes).bfloat16()
        targets = torch.arange(5, device=DEVICE)
        losses = cross_entropy(logits, targets, reduction="none", config=CONFIG)
        truth = plain_torch_cross_entropy(logits.double(), targets, reduction="none")
        torch.testing.assert_close(losses, truth.float(), rtol=2e-6, atol=0)


# --- memory and launches ---


@pytest.mark.parametrize("rows", [1, 5000])
def test_many_programs_give_the_same_bits_every_time(rows: int) -> None:
    logits = normal(rows, 3)
    targets = torch.arange(rows, device=DEVICE) % 3
    found = []
    for _ in range(2):
        meter = Meter(DEVICE, topk=(2,))
        grad = cross_entropy_step(logits, targets, meter, label_smoothing=0.1, config=CONFIG)
        assert meter.ticket.item() == 0  # ready for the next launch
        found.append((grad, meter.sums, meter.counts))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert meter.compute().valid == rows


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.25, 3.0])], ids=["plain", "weight"])
def test_weights_added_up_by_another_launch_are_the_same(
    weight: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = normal(700, 3)
    targets = torch.arange(700, device=DEVICE) % 4
    targets[targets == 3] = -100
    weight = None if weight is None else weight.to(DEVICE)
    within = cross_entropy_step(logits, targets, None, weight=weight, config=CONFIG)
    choose = launch.choose
    monkeypatch.setattr(
        launch, "choose", lambda *sizes: dataclasses.replace(choose(*sizes), count_first=True)
    )
    apart = cross_entropy_step(logits, targets, None, weight=weight, config=CONFIG)
    torch.testing.assert_close(apart, within, rtol=1e-6, atol=0)


def test_strides_are_followed() -> None:
    buffer = normal(3, 4, 5, 40)
    targets = torch.arange(60, device=DEVICE).view(3, 4, 5) % 11
    for logits, t in (
        (buffer[0, 1:, :-1, 2:13], targets[0, 1:, :-1]),  # rows in two dimensions
        (buffer[0].transpose(0, 1)[:, :, :11], targets[0].t()),
        (buffer[:, ::2, 1:4, :11], targets[:, ::2, 1:4]),  # in three: copied
        (buffer[0, 0].t()[:11], targets[0].flatten()[:11] % 5),  # classes apart: copied
    ):
        expected = cross_entropy_step(logits.contiguous(), t, None, config=CONFIG)
        assert torch.equal(cross_entropy_step(logits, t, None, config=CONFIG), expected)
        out = torch.empty(*logits.shape[:-1], 20, device=DEVICE)[..., 5 : 5 + logits.shape[-1]]
        assert torch.equal(cross_entropy_step(logits, t, None, out=out, config=CONFIG), expected)
        if logits.stride(-1) == 1:
            assert torch.equal(
                cross_entropy_step(logits, t, None, inplace=True, config=CONFIG), expected
            )


# --- what only a GPU may see, and what no public function reaches on the CPU ---


@pytest.mark.parametrize("normalizer", [None, 2.0])
def test_bad_targets_are_left_out_as_in_the_reference(normalizer: float | None) -> None:
    logits = normal(5, 6)
    targets = torch.tensor([0, 6, -7, -100, 2**40], device=DEVICE)
    for reduction in ("mean", "none"):
        if reduction == "none" and normalizer is not None:
            continue
        options = Options(None, -100, 0.1, 0.0, None, reduction, normalizer)
        for meters in ((None, None), (Meter(DEVICE), Meter(DEVICE))):
            loss, *kept = triton.forward(logits, targets, options, meters[0], for_backward=True)
            expected, *state = reference.forward(logits, targets, options, meters[1])
            torch.testing.assert_close(loss, expected, equal_nan=True)
            ones = torch.ones_like(loss)
            grad = triton.backward(ones, logits, targets, *kept, options)
            torch.testing.assert_close(
                grad, reference.backward(ones, logits, targets, *state, options)
            )
            if meters[0] is not None and meters[1] is not None:
                assert torch.equal(meters[0].counts, meters[1].counts)
                torch.testing.assert_close(meters[0].sums, meters[1].sums)
        if reduction == "mean":
            step = triton.step(logits, targets, options, None, 1.0, None)
            torch.testing.assert_close(
                step, reference.step(logits, targets, options, None, 1.0, None)
            )


@pytest.mark.parametrize("values", [[0, 2, 1, -100], [-100, -100, -100, -100]], ids=str)
def test_record_adds_what_the_reference_adds(values: list[int]) -> None:
    logits = normal(4, 3)
    targets = torch.tensor(values, device=DEVICE)
    logits[1, 0] = NAN
    options = Options(None, -100, 0.0, 0.0, None, "mean", None)
    meters = Meter(DEVICE, topk=(2,)), Meter(DEVICE, topk=(2,))
    for module, meter in zip((triton, reference), meters, strict=True):
        module.record(torch.tensor(1.25, device=DEVICE), logits, targets, meter, options)
    assert torch.equal(meters[0].counts, meters[1].counts)
    assert torch.equal(meters[0].sums, meters[1].sums)


# --- the launch choice ---


@pytest.mark.parametrize(
    "classes", [1, 2, 10, 1000, 1024, 1025, 16384, 16385, 32000, 50257, 128256, 262144]
)
def test_nothing_compiled_depends_on_the_rows(classes: int) -> None:
    compiled = {
        (x.rows, x.block, x.resident, x.warps, x.registers)
        for x in (chosen(rows, classes) for rows in (0, 1, 16, 17, 512, 1 << 20))
    }
    assert len(compiled) == 1


def test_short_rows_share_a_tile_and_long_ones_are_read_in_pieces() -> None:
    assert (chosen(512, 10).rows, chosen(512, 10).block) == (32, 16)
    assert (chosen(512, 1000).rows, chosen(512, 1000).block) == (1, 1024)
    assert chosen(512, 16384).resident
    assert not chosen(512, 16385).resident
    assert not chosen(512, 16384, burdens=1).resident
    # Options and measures together leave registers for fewer programs.
    assert chosen(512, 10, burdens=2).registers > chosen(512, 10, burdens=1).registers


def test_programs_are_as_many_as_run_at_once_and_no_more_than_tiles() -> None:
    assert chosen(0, 10).programs == 1  # still has to count the batch
    assert chosen(33, 10).programs == 2
    assert chosen(1 << 20, 8192).programs % 132 == 0
    # Rows in flight stay in the cache: two for each multiprocessor of 64 KB, one of 256 KB.
    assert chosen(1 << 20, 32000, element_size=2).programs == 264
    assert chosen(1 << 20, 128256, element_size=2).programs == 132


def test_weights_are_added_up_first_where_many_programs_would_read_much() -> None:
    assert not chosen(512, 10).count_first
    assert not chosen(8192, 128256).count_first
    assert chosen(1 << 20, 10).count_first


# --- compiling, without a GPU: in a process where the interpreter is off ---

KEYS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from esper_kernels import Meter
from esper_kernels.ops.cross_entropy import triton
from esper_kernels.ops.cross_entropy.reference import Options

backend, keys = make_backend(GPUTarget("cuda", 90, 32)), set()

def run(self, *args, grid, warmup, **options):
    bind = jit.create_function_from_signature(self.signature, self.params, backend)
    keys.add((self.fn.__name__, str(bind(*args, **options, debug=False)[1:])))

jit.JITFunction.run = run

def launch(rows, classes=10, smoothing=0.1, ignored=0, at=0, **options):
    targets = torch.zeros(rows + at, dtype=torch.int64)[at:]
    targets[:ignored] = -100
    given = Options(None, -100, smoothing, 0.0, None, "mean", options.get("normalizer"))
    logits, meter = torch.zeros(rows, classes), Meter("cpu")
    triton.step(logits, targets, given, meter, options.get("scale", 1.0), None)
    _, kept = triton.forward(logits, targets, given, meter, for_backward=True)
    triton.backward(torch.ones(()), logits, targets, kept, given)
    return len(keys)

"""


def compiled_variants(code: str) -> list[int]:
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", KEYS + code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_what_changes_from_batch_to_batch_compiles_nothing() -> None:
    code = """
print(launch(64))
for rows in (1, 2, 16, 17, 48, 512, 1000):
    print(launch(rows))
print(launch(64, smoothing=0.3), launch(64, ignored=7), launch(64, at=1), launch(64, scale=1.0))
print(launch(64, scale=65536.0))
"""
    assert compiled_variants(code) == [3] * 13  # step, forward, backward


def test_what_belongs_to_a_model_compiles_once() -> None:
    code = """
print(launch(64), launch(64, classes=1000), launch(64, smoothing=torch.tensor(0.1)))
print(launch(9, smoothing=torch.tensor(0.3)), launch(64, smoothing=torch.arange(2.0)[1]))
"""
    assert compiled_variants(code) == [3, 6, 9, 9, 9]


def test_without_the_interpreter_the_cpu_is_refused_with_the_way_out() -> None:
    code = (
        "import esper_kernels as k, torch; k.select_backend('cross_entropy', 'cpu', "
        "torch.float32, CONFIG)"
    )
    code = code.replace("CONFIG", "k.KernelConfig(backend='triton')")
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "TRITON_INTERPRET=1" in done.stderr.splitlines()[-1]
