"""The computation of each rank by itself where the classes are divided: all shards in one process,
beside the definition for undivided classes. test_vocab_parallel has processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
)
from esper_kernels.measures import MeasurePlan
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.reference import Forward, Options
from esper_kernels.ops.vocab_parallel import ClassShard, cpp
from esper_kernels.ops.vocab_parallel import reference as eager
from esper_kernels.ops.vocab_parallel.combine import sums_of
from esper_kernels.testing import (
    CrossEntropySample,
    assert_no_worse_than_eager,
    cross_entropy_samples,
)
from tests.helpers.class_shards import EVERY_BACKEND, EVERY_DAY, backend_module, needs_cpp

SAMPLES = [sample for sample in cross_entropy_samples() if sample.logits.shape[-1] >= 3]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=EVERY_DAY)
def module(request: pytest.FixtureRequest) -> Any:
    """Each backend, on CPU tensors."""
    return backend_module(request.param)


def shards_of(sizes: list[int]) -> list[ClassShard]:
    return [ClassShard(sum(sizes[:i]), sum(sizes)) for i in range(len(sizes))]


def divided(
    module: Any, logits: Tensor, targets: Tensor, options: Options, sizes: list[int]
) -> tuple[Forward, Tensor, Tensor]:
    """Loss, gradient and the rank of each target, as ranks with these shards find them."""
    shards = shards_of(sizes)
    parts = logits.split(sizes, -1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = reference.classify(targets, logits.shape[-1], options.ignore_index)
    target_logit = reference.pick(logits, rows.target).to(dtype)
    sums = [
        module.class_sums(part, targets, options, target_logit, None, shard)
        for part, shard in zip(parts, shards, strict=True)
    ]
    row_sums, rank = sums_of(torch.stack(sums), options, dtype)
    weights = reference.class_weights(options.weight, logits.shape[-1], row_sums.row_max)
    result, _, _ = reference.loss_of(row_sums, rows, options, weights, True)
    grad_output = torch.ones_like(result.loss)
    grads = [
        module.backward(grad_output, part, targets, *result[1:], options, shard, None)
        for part, shard in zip(parts, shards, strict=True)
    ]
    return result, torch.cat(grads, -1), rank


def check(module: Any, logits: Tensor, targets: Tensor, options: Options, sizes: list[int]) -> None:
    """Compare with float64 and eager torch without any division."""
    found, grad, rank = divided(module, logits, targets, options, sizes)
    exact, rival = (reference.forward(x, targets, options, None) for x in (logits.double(), logits))
    torch.testing.assert_close(
        found.loss.double(), exact.loss, rtol=2e-6, atol=1e-6, equal_nan=True
    )
    grads = [
        reference.backward(torch.ones_like(r.loss), x, targets, *r[1:], options)
        for r, x in ((exact, logits.double()), (rival, logits))
    ]
    assert_no_worse_than_eager(grad, grads[1], grads[0])
    rows = reference.classify(targets, logits.shape[-1], options.ignore_index)
    counted = rows.valid & exact.row_max.isfinite()
    ranks = reference.ranks(logits, rows.target, reference.pick(logits, rows.target))
    assert torch.equal(rank[counted].long(), ranks[counted].long())
    assert torch.equal(found.row_max.isfinite()[rows.valid], exact.row_max.isfinite()[rows.valid])


def batch(classes: int, rows: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[0] = -100
    targets[1] = classes - 1
    return (3 * torch.randn(rows, classes, generator=generator)).to(dtype), targets


EVERYTHING = Options(label_smoothing=0.1, z_loss=1e-2, softcap=5.0)


@needs_cpp
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("options", [Options(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    "sizes",
    [[1, 1], [1, 2, 1, 3], [31, 33], [4096, 1, 4097], [1, 9000]],
    ids=str,
)
def test_shards_of_any_size_add_up(
    name: str, dtype: torch.dtype, options: Options, sizes: list[int]
) -> None:
    logits, targets = batch(sum(sizes), dtype=dtype)
    weight = torch.linspace(0.5, 2.0, sum(sizes)) if options.softcap else None
    given = options._replace(instruction_set=name, weight=weight)
    check(cpp, logits, targets, given, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [Options(), EVERYTHING], ids=["plain", "everything"])
def test_any_backend_takes_long_and_short_shards(
    module: Any, dtype: torch.dtype, options: Options
) -> None:
    for sizes in ([1, 2, 1, 3], [31, 33], [1, 2048, 2051]):
        logits, targets = batch(sum(sizes), dtype=dtype)
        weight = torch.linspace(0.5, 2.0, sum(sizes)) if options.softcap else None
        check(module, logits, targets, options._replace(weight=weight), sizes)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_sample_in_three_shards(module: Any, sample: CrossEntropySample) -> None:
    sizes = [1, sample.logits.shape[-1] - 2, 1]
    check(module, sample.logits, sample.targets, Options(**sample.options), sizes)


@pytest.mark.parametrize("module", EVERY_BACKEND, indirect=True)
@pytest.mark.parametrize("sizes", [[2, 9], [4, 3, 4]], ids=str)
def test_mixup_with_its_targets_in_any_shard(module: Any, sizes: list[int]) -> None:
    logits, targets = batch(11, rows=9)
    logits[3, 4] = -torch.inf
    targets2 = targets.roll(1)
    share = torch.linspace(0.0, 1.0, 9)
    targets, options = reference.mixed(targets, targets2, share, EVERYTHING, logits)
    check(module, logits, targets, options._replace(softcap=None, label_smoothing=0.0), sizes)
    check(module, logits.clamp(min=-9.0), targets, options, sizes)


def test_ties_across_shards_go_to_the_lower_class(module: Any) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 3.0]]).repeat(6, 1)
    targets = torch.arange(6)
    for sizes in ([1, 5], [2, 1, 3], [3, 3], [1] * 6):
        _, _, rank = divided(module, logits, targets, Options(), sizes)
        assert rank.tolist() == [4, 0, 1, 5, 2, 3]


def test_one_bad_shard_makes_the_row_bad_on_every_rank(module: Any) -> None:
    logits, targets = batch(40)
    logits[1, 0], logits[2, 20], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :20] = -torch.inf  # one shard only: the row is finite
    targets[4] = 30
    found, grad, _ = divided(module, logits, targets, Options(reduction="none"), [20, 20])
    assert found.loss.isnan().tolist() == [False, True, True, True, False, False, False]
    assert grad.isnan().all(-1).tolist() == [False, True, True, True, False, False, False]
    assert not grad[4].isnan().any()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without torch.distributed or gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("module", EVERY_BACKEND, indirect=True)
def test_one_rank_alone_has_all_classes(module: Any) -> None:
    backend = KernelConfig(backend=module.__name__.rpartition(".")[2].replace("reference", "eager"))
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(11, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([0, 10, -100, 4, 4])
    shard = ClassShard.across(len(weight))
    meters = [Meter("cpu", topk=(3,)) for _ in range(3)]
    losses = [
        vocab_parallel_cross_entropy(
            hidden @ weight.t(),
            targets,
            shard,
            label_smoothing=0.1,
            meter=meters[0],
            config=backend,
        ),
        linear_cross_entropy(
            hidden,
            weight,
            targets,
            label_smoothing=0.1,
            shard=shard,
            meter=meters[1],
            config=backend,
        ),
        F.cross_entropy(hidden @ weight.t(), targets, label_smoothing=0.1),
    ]
    found = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    cross_entropy(hidden @ weight.t(), targets, label_smoothing=0.1, meter=meters[2])
    for loss, grads, meter in zip(losses[:2], found[:2], meters[:2], strict=True):
        torch.testing.assert_close(loss, losses[2])
        torch.testing.assert_close(grads, found[2])
        assert torch.equal(meter.counts, meters[2].counts)


@needs_cpp
def test_an_undivided_call_keeps_its_bits() -> None:
    """One shard of all classes, row by row, and the op without any division."""
    for classes in (33, 5000):
        logits, targets = batch(classes)
        loss, saved = cpp.cpp.forward(logits, targets, EVERYTHING, None, True)
        assert saved is not None
        arguments = (torch.ones_like(loss), logits, targets, saved, EVERYTHING)
        shard = {"first_class": 0, "num_classes": classes}
        assert torch.equal(cpp.cpp.backward(*arguments), cpp.cpp.backward(*arguments, **shard))


@needs_cpp
@pytest.mark.parametrize("full", [False, True])
def test_ops_are_what_their_schemas_say(full: bool) -> None:
    logits, targets = batch(40, rows=5)
    weight = torch.rand(100) if full else None
    second = targets.clamp(min=0).flip(0) if full else None
    shares = torch.full((2, 5), 0.5) if full else None
    softcap = 5.0 if full else None
    plan = MeasurePlan(100, 3, 1, 0) if full else None
    sums = torch.empty(eager.num_sums(plan), 5, dtype=torch.float64)
    target_logits = torch.zeros(5) if full else None
    of_classes = (weight, -100, full, softcap, 0, 20, 100)
    torch.library.opcheck(
        torch.ops.esper.class_sums.default,
        (logits, targets, *of_classes, target_logits, second, shares, plan or (), sums),
    )
    saved = torch.ones(11)
    options = (weight, -100, 0.1, 0.0, softcap, 0)
    memory = (torch.ones(()), saved, torch.empty_like(logits))
    torch.library.opcheck(
        torch.ops.esper.cross_entropy_backward.default,
        (logits, targets, *options, *memory, None, None, None, second, shares, 20, 100),
    )


@needs_cpp
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_class": 61}, "some of all classes"),
        ({"first_class": -1}, "some of all classes"),
        ({"num_classes": 39}, "some of all classes"),
        ({"num_classes": -(2**63)}, "some of all classes"),
        ({"weight": torch.ones(40)}, "weight of all classes"),
        ({"targets": torch.full((5,), 100)}, "target 100 of row 0 is outside"),
        ({"target_logits": torch.zeros(4)}, "target_logits to be contiguous"),
        ({"sums": torch.zeros(7, 4, dtype=torch.float64)}, "sums to be contiguous"),
        ({"sums": torch.zeros(7, 5)}, "sums to have another dtype"),
        ({"measures": (100, 3, 1, 0)}, "sums to be contiguous"),
        ({"measures": (100, 3, 1)}, "the four numbers of a meter's measures"),
    ],
    ids=str,
)
def test_the_op_refuses_what_would_reach_other_memory(change: dict[str, Any], words: str) -> None:
    logits, targets = batch(40, rows=5)
    sums = torch.zeros(7, 5, dtype=torch.float64)
    given = {
        "logits": logits,
        "targets": targets,
        "weight": None,
        "ignore_index": -100,
        "smoothed": True,
        "softcap": None,
        "instruction_set": 0,
        "first_class": 20,
        "num_classes": 100,
        "target_logits": None,
        "second": None,
        "shares": None,
        "measures": (),
        "sums": sums,
    }
    with pytest.raises((RuntimeError, ValueError, IndexError), match=words):
        torch.ops.esper.class_sums.default(**{**given, **change})
    assert not sums.any()


@needs_cpp
def test_class_sums_of_rows_that_are_not_contiguous() -> None:
    logits, targets = batch(40, rows=6)
    options = EVERYTHING._replace(softcap=None)
    shard = ClassShard(10, 60)
    plan = MeasurePlan(0, 3, 1, 0)
    expected = cpp.class_sums(logits, targets, options, None, plan, shard)
    for same in (
        logits.t().contiguous().t(),
        torch.cat([logits, logits], -1)[:, :40],
        torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(6, 40),
    ):
        assert torch.equal(cpp.class_sums(same, targets, options, None, plan, shard), expected)
    folded = cpp.class_sums(logits.view(2, 3, 40), targets.view(2, 3), options, None, plan, shard)
    assert torch.equal(folded.flatten(1), expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_triton_kernels_compile_without_a_spill() -> None:
    pytest.importorskip("triton")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.divided_kernels"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 72
    assert {row["sm"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spilled_bytes"] == 0, row
