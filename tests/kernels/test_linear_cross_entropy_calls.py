"""Calls of linear cross entropy: what it refuses, `torch.compile`, and its memory."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from esper_kernels import (
    KernelConfig,
    LinearGradients,
    Meter,
    linear_cross_entropy,
    linear_cross_entropy_step,
    linear_token_logprobs,
)
from esper_kernels.ops.linear_cross_entropy import sizes

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(6, 4, generator=GENERATOR)
WEIGHT = torch.randn(5, 4, generator=GENERATOR)
TARGETS = torch.tensor([0, 4, -100, 2, 3, 1])


def both(
    hidden: Any, weight: Any, targets: Any, meter: Any, config: KernelConfig, **options: Any
) -> Iterator[Callable[[], Any]]:
    yield lambda: linear_cross_entropy(
        hidden, weight, targets, meter=meter, **options, config=config
    )
    yield lambda: linear_cross_entropy_step(
        hidden, weight, targets, meter, **options, config=config
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": HIDDEN.tolist()}, TypeError, "hidden must be a dense tensor.*list"),
        ({"weight": WEIGHT.to_sparse()}, TypeError, "weight must be a dense tensor.*sparse"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be one of.*got torch.int64"),
        (
            {"weight": WEIGHT.double()},
            TypeError,
            "one dtype.*hidden torch.float32, weight torch.fl",
        ),
        ({"bias": torch.zeros(5).half()}, TypeError, "one dtype.*bias torch.float16"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"H = 3.*\(5, 3\).*got shape \(6, 4\)$"),
        ({"weight": WEIGHT.t()}, ValueError, r"H = 5.*\(4, 5\).*\(6, 4\); .* pass weight.t\(\)"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \[V, H\].*\(4,\)"),
        ({"weight": WEIGHT[:0]}, ValueError, r"V of at least 1, got shape \(0, 4\)"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must be \[..., H\].*\(\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[V\] with V = 5.*\(4,\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "one device.*hidden on cpu, weight on meta"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets on meta"),
        ({"targets": TARGETS[:5]}, ValueError, r"expected targets of shape \(6,\).*got \(5,\)"),
        ({"targets": torch.zeros(6, 5)}, TypeError, "soft .probability. targets are not served"),
        ({"targets": TARGETS.float()}, TypeError, "class indices.*got torch.float32"),
        ({"targets": TARGETS + 1}, IndexError, r"target 5 of row \(1,\) is outside \[0, 5\)"),
        ({"meter": "meter"}, TypeError, "meter must be a Meter"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be.*\[5\].*\(4,\)"),
        ({"softcap": 0}, ValueError, r"softcap .* must be in .* got 0"),
        ({"normalizer": -1}, ValueError, "normalizer must be in"),
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none', got 'avg'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_change_nothing(
    config: KernelConfig, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    meter = Meter("cpu")
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "meter": meter}
    for call in both(**{**arguments, **change}, config=config):
        with pytest.raises(error, match=words):
            call()
    assert not meter.counts.any()
    assert not meter.sums.any()


def test_a_bad_target_in_the_last_chunk_leaves_everything_as_it_was(
    config: KernelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "chunk_rows", lambda *arguments: 2)
    meter = Meter("cpu")
    memory = torch.ones(5, 4)
    targets = TARGETS.clone()
    targets[-1] = 7
    with pytest.raises(IndexError, match=r"target 7 of row \(5,\)"):
        linear_cross_entropy_step(HIDDEN, WEIGHT, targets, meter, weight_grad=memory, config=config)
    assert memory.eq(1).all()
    assert not meter.counts.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "none"}, "takes reduction 'mean' or 'sum'"),
        ({"weight_grad": torch.zeros(4, 5)}, r"weight_grad must be.*\(5, 4\).*got.*\(4, 5\)"),
        ({"weight_grad": torch.zeros(4, 5).t()}, "weight_grad must be a contiguous tensor"),
        ({"weight_grad": torch.zeros(5, 4).half()}, "torch.float32 on cpu.*torch.float16"),
        ({"weight_grad": torch.zeros(5, 4).requires_grad_()}, "not require grad"),
        ({"weight_grad": torch._efficientzerotensor((5, 4))}, "zeros without memory"),
        ({"weight_grad": torch._neg_view(torch.zeros(5, 4))}, "negative of its values"),
        ({"weight_grad": torch.zeros(5, 4, device="meta")}, "weight_grad must be.*on cpu"),
        ({"weight_grad": WEIGHT}, "weight is in the memory that the gradient is written to"),
        ({"bias_grad": torch.zeros(5)}, "expected no bias_grad without bias"),
        ({"grad_scale": torch.ones(2)}, "grad_scale as a tensor must be 0-d"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_step_are_named(
    config: KernelConfig, options: dict[str, Any], words: str
) -> None:
    meter = Meter("cpu")
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy_step(HIDDEN, WEIGHT, TARGETS, meter, **options, config=config)
    assert not meter.counts.any()


def test_a_backend_that_cannot_serve_is_named() -> None:
    with pytest.raises(ValueError, match=r"no backend serves linear_cross_entropy.*float64"):
        linear_cross_entropy(
            HIDDEN.double(), WEIGHT.double(), TARGETS, config=KernelConfig(backend="cpp")
        )


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_give_shapes(config: KernelConfig, kind: str) -> None:
    if config.backend == "triton":
        pytest.skip("Triton's kernels serve neither")
    device = "meta" if kind == "meta" else "cpu"
    with FakeTensorMode() if kind == "fake" else nullcontext():
        hidden = torch.empty(6, 4, device=device, requires_grad=True)
        weight = torch.empty(5, 4, device=device, requires_grad=True)
        targets = torch.empty(6, dtype=torch.int64, device=device)
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none", config=config)
        losses.sum().backward()
        gradients = linear_cross_entropy_step(hidden, weight, targets, None, config=config)
        logprobs = linear_token_logprobs(hidden, weight, targets)
    assert losses.shape == logprobs.shape == (6,)  # type: ignore[union-attr]
    for found in (hidden.grad, gradients.hidden):
        assert found is not None
        assert found.shape == (6, 4)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (WEIGHT,), (torch.ones_like(WEIGHT),)),
    "grad": lambda f: torch.func.grad(f)(WEIGHT),
    "vmap": lambda f: torch.vmap(f)(WEIGHT[None]),
    "torch.jit.trace": lambda f: torch.jit.trace(f, WEIGHT),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_by_name(config: KernelConfig, name: str) -> None:
    meter = Meter("cpu")
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda w: linear_cross_entropy(HIDDEN, w, TARGETS, meter=meter, config=config),
        lambda w: linear_cross_entropy_step(
            HIDDEN, w, TARGETS, meter, weight_grad=torch.zeros(5, 4), config=config
        ).weight.sum(),  # type: ignore[union-attr]
    ]
    for function in functions:
        with pytest.raises(
            NotImplementedError, match=r"linear_cross_entropy.* does not work inside"
        ):
            TRANSFORMS[name](function)
    assert not meter.counts.any()


def test_dual_tensors_are_refused(config: KernelConfig) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            linear_cross_entropy(HIDDEN, dual, TARGETS, config=config)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.in_turn
@pytest.mark.best_instructions
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_loss_equals_eager(config: KernelConfig, compiler: str, reduction: str) -> None:
    """Any number of rows and another smoothing are the same graph."""

    def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, e: Tensor, meter: Meter) -> Tensor:
        return linear_cross_entropy(
            hidden * 2,
            weight,
            targets,
            label_smoothing=e,
            z_loss=0.1,
            softcap=4.0,
            reduction=reduction,
            meter=meter,
            config=config,
        ).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler, dynamic=True)
    meters = Meter("cpu", topk=(3,)), Meter("cpu", topk=(3,))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, smoothing in ((6, 0.1), (5, 0.2), (3, 0.0)):
            results = []
            for function, meter in zip((loss_of, compiled), meters, strict=True):
                leaves = [HIDDEN[:rows].clone().requires_grad_(), WEIGHT.clone().requires_grad_()]
                loss = function(*leaves, TARGETS[:rows].clone(), torch.tensor(smoothing), meter)
                loss.backward()
                results.append((loss, *(leaf.grad for leaf in leaves)))
            torch.testing.assert_close(results[1], results[0])
    assert torch.equal(meters[0].counts, meters[1].counts)
    torch.testing.assert_close(meters[0].sums, meters[1].sums)


@pytest.mark.best_instructions
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_step_equals_eager(config: KernelConfig, compiler: str) -> None:
    def step(weight: Tensor, memory: Tensor, meter: Meter) -> LinearGradients:
        return linear_cross_entropy_step(
            HIDDEN.requires_grad_(False),
            weight,
            TARGETS,
            meter,
            grad_scale=8.0,
            weight_grad=memory,
            config=config,
        )

    meters = Meter("cpu"), Meter("cpu")
    memories = torch.ones(5, 4), torch.ones(5, 4)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for function, memory, meter in zip((step, compiled), memories, meters, strict=True):
        function(WEIGHT, memory, meter)
    torch.testing.assert_close(memories[1], memories[0])
    assert torch.equal(meters[0].counts, meters[1].counts)


# --- memory ---


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1024, 8192, 100_003])
@pytest.mark.parametrize("classes", [1, 10, 1000, 50257, 262144])
@pytest.mark.parametrize("hidden", [1, 384, 4096])
@pytest.mark.parametrize(("element_size", "converts"), [(4, False), (2, True)])
def test_chunks_stay_within_their_memory(
    rows: int, classes: int, hidden: int, element_size: int, converts: bool
) -> None:
    """256 rows of logits, 5 % of them or 4 MiB, whichever is most: unless one row needs more."""
    most = sizes.chunk_rows(rows, classes, hidden, element_size, converts)
    panel = min(classes, sizes.CPU_PANEL)
    used = most * (classes * element_size + 4 * hidden)
    used += 4 * (panel * hidden + most * (panel + hidden)) if converts else 0
    row = classes * element_size
    assert 1 <= most <= max(1, rows)
    assert used <= max(256 * row, rows * row // 20, 4 << 20) or most == 1
    chunks = -(-rows // most)
    assert rows == 0 or rows > (chunks - 1) * most  # none is empty


def test_chunks_on_a_gpu_are_large() -> None:
    """A 64th of 80 GiB: 4988 rows of 128256 classes in bfloat16, thus two chunks of 4096."""
    assert sizes.chunk_rows(8192, 128256, 4096, 2, False, device_bytes=80 << 30) == 4096


FORMS = ("step", "loss", "no_grad")
# Blocks of 64 KiB and more are mapped one by one, so that each counts.
CODE = """
import resource, sys
import torch
from esper_kernels import KernelConfig, Meter, linear_cross_entropy, linear_cross_entropy_step

rows, classes, width = (int(x) for x in sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
torch.set_num_threads(1)
config, meter = KernelConfig(backend="cpp"), Meter("cpu", topk=(1, 5))
_, most = resource.getrlimit(resource.RLIMIT_AS)

def call(form, hidden, weight, targets, weight_grad):
    if form == "step":
        linear_cross_entropy_step(
            hidden, weight, targets, meter, weight_grad=weight_grad, config=config
        )
    elif form == "loss":
        linear_cross_entropy(hidden, weight, targets, meter=meter, config=config).backward()
    else:
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets, meter=meter, config=config)

def inputs(rows, classes, width):
    hidden = torch.ones(rows, width, dtype=dtype).requires_grad_()
    weight = torch.ones(classes, width, dtype=dtype).requires_grad_()
    return hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.zeros(classes, width)

def call_within_the_limit(form):
    call(form, *inputs(64, 3000, 64))  # what libraries allocate once
    sample = inputs(rows, classes, width)
    logits = rows * classes * dtype.itemsize
    allowed = max(256 * classes * dtype.itemsize, logits // 20) + (4 << 20)
    allowed += rows * width * dtype.itemsize  # the gradient of hidden, an output
    if form == "loss":  # the gradient of the weight, an output, and its float32 sum
        allowed += classes * width * (4 + dtype.itemsize)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, most))
    call(form, *sample)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

for form in sys.argv[5:]:
    meter.reset()
    call_within_the_limit(form)
    print(form, meter.compute().valid)
"""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="the address space is limited and read as on Linux",
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_memory_is_that_of_256_rows_of_logits(dtype: str) -> None:
    """The logits would be 8 times that. 4 MiB are for the library of matrix products."""
    command = [sys.executable, "-c", CODE, "2048", "20011", "64", dtype, *FORMS]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{form} {64 + 2048}" for form in FORMS]
