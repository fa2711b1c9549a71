"""The loss inside torch.compile(fullgraph=True), autocast, no_grad and inference_mode."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, record_loss

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 4, -100, 2, 3, 1])

# to a compiler, the instruction set of the kernels is a number that it hands on
pytestmark = pytest.mark.best_instructions

COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """torch's compiler makes other code for one thread, which hid a fault of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.in_turn
@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_loss_equals_eager_and_schedules_do_not_recompile(
    config: KernelConfig, compiler: str
) -> None:
    def loss_of(logits: Tensor, smoothing: Tensor, meter: Meter) -> Tensor:
        return cross_entropy(
            logits,
            TARGETS,
            label_smoothing=smoothing,
            z_loss=0.1,
            softcap=4.0,
            meter=meter,
            config=config,
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    meters = Meter("cpu", topk=(3,)), Meter("cpu", topk=(3,))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for smoothing in (0.1, 0.2, 0.0):
            results = []
            for function, meter in zip((loss_of, compiled), meters, strict=True):
                leaf = LOGITS.clone().requires_grad_()
                loss = function(leaf, torch.tensor(smoothing), meter)
                loss.backward()
                results.append((loss, leaf.grad))
            torch.testing.assert_close(results[1], results[0])
    expected, actual = (meter.compute() for meter in meters)
    assert actual.loss == pytest.approx(expected.loss)
    assert (actual.correct, actual.valid, actual.batches) == (expected.correct, 15, 3)


@pytest.mark.in_turn
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_step_and_record_equal_eager(config: KernelConfig, compiler: str) -> None:
    def step(logits: Tensor, meter: Meter) -> Tensor:
        record_loss(torch.tensor(1.5), logits, TARGETS, meter)
        return cross_entropy_step(logits, TARGETS, meter, grad_scale=8.0, config=config)

    meters = Meter("cpu"), Meter("cpu")
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(LOGITS, meters[0]), step(LOGITS, meters[1]))
    torch.testing.assert_close(meters[0].sums, meters[1].sums)
    assert torch.equal(meters[0].counts, meters[1].counts)


@pytest.mark.in_turn
@pytest.mark.parametrize("compiler", COMPILERS[1:])
@pytest.mark.parametrize("form", ["loss", "step", "inplace", "out"])
def test_batches_of_any_size_need_two_compilations(
    config: KernelConfig, compiler: str, form: str
) -> None:
    """One for the first size, one for all others; ignored rows and a label smoothing that changes
    need none."""

    def gradient(
        hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: Tensor, meter: Meter
    ) -> Tensor:
        logits = hidden @ weight
        if form == "loss":
            return cross_entropy(
                logits, targets, label_smoothing=smoothing, meter=meter, config=config
            )
        memory = {"inplace": {"inplace": True}, "out": {"out": torch.empty_like(logits)}}.get(
            form, {}
        )
        return cross_entropy_step(
            logits, targets, meter, label_smoothing=smoothing, **memory, config=config
        )

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(gradient, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 33, generator=generator, requires_grad=form == "loss")
    meters = Meter("cpu"), Meter("cpu")
    for step, rows in enumerate((6, 3, 17, 2, 40, 6)):
        hidden = torch.randn(rows, 4, generator=generator)
        targets = torch.randint(33, (rows,), generator=generator)
        targets[::3] = -100
        found = []
        for function, meter in zip((gradient, compiled), meters, strict=True):
            result = function(hidden, weight, targets, torch.tensor(step / 10), meter)
            found.append((result, *(torch.autograd.grad(result, weight) if form == "loss" else ())))
        torch.testing.assert_close(found[1], found[0])
    assert counter.frame_count <= 2
    torch.testing.assert_close(meters[1].sums, meters[0].sums)
    assert torch.equal(meters[1].counts, meters[0].counts)
    assert meters[1].compute().batches == 6


def test_compiled_bad_target_raises_and_leaves_the_meter(config: KernelConfig) -> None:
    meter = Meter("cpu")
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, IndexError), match="outside"):
        compiled(LOGITS, TARGETS + 3, meter=meter, config=config)
    assert meter.counts.eq(0).all()


def test_sizes_may_be_dynamic(config: KernelConfig) -> None:
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 3, 5):
            logits = LOGITS[:rows].clone()
            targets = TARGETS[:rows].clone()
            expected = cross_entropy(logits, targets, config=config)
            torch.testing.assert_close(compiled(logits, targets, config=config), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_loss_is_the_same_and_detached(config: KernelConfig, guard: type) -> None:
    leaf = LOGITS.clone().requires_grad_()
    expected = cross_entropy(leaf, TARGETS, config=config)
    with guard():
        meter = Meter("cpu")
        loss = cross_entropy(leaf, TARGETS, meter=meter, config=config)
        grad = cross_entropy_step(leaf.clone(), TARGETS, meter, inplace=True, config=config)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    expected.backward()
    assert torch.equal(grad, leaf.grad)
    # the meter works outside of the guard too
    cross_entropy(leaf, TARGETS, meter=meter, config=config)
    assert meter.compute().batches == 3


def test_autocast_gives_float32_arithmetic(config: KernelConfig) -> None:
    weight = torch.eye(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = LOGITS @ weight
        loss = cross_entropy(logits, TARGETS, config=config)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, cross_entropy(logits.float(), TARGETS, config=config))
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.in_turn
@pytest.mark.parametrize("compiler", COMPILERS[1:])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        *itertools.product(
            ("loss", "step"), ("label_smoothing", "z_loss", "softcap", "normalizer")
        ),
        ("step", "grad_scale"),
    ],
)
def test_a_number_that_changes_every_step_does_not_recompile(
    config: KernelConfig, compiler: str, name: str, form: str
) -> None:
    """One compilation for the first value, one for all others."""

    def run(logits: Tensor, number: float) -> Tensor:
        if form == "loss":
            return cross_entropy(logits, TARGETS, **{name: number}, config=config)
        return cross_entropy_step(logits, TARGETS, None, **{name: number}, config=config)

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for i in range(3):
        leaf = LOGITS.clone().requires_grad_(form == "loss")
        rival = LOGITS.clone().requires_grad_(form == "loss")
        number = 0.05 * (i + 1)
        actual = compiled(leaf, number)
        expected = run(rival, number)
        torch.testing.assert_close(actual, expected)
        if form == "loss":
            actual.backward()
            expected.backward()
            torch.testing.assert_close(leaf.grad, rival.grad)
    assert counter.frame_count <= 2
