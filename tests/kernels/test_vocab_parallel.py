"""Cross entropy with the classes divided among 2 and 4 processes (gloo), beside the same without
any division, which the other tests compare with plain torch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from esper_kernels import (
    ClassShard,
    KernelConfig,
    Meter,
    cross_entropy,
    cross_entropy_step,
    linear_cross_entropy,
    linear_cross_entropy_step,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_step,
)
from esper_kernels.testing import assert_no_worse_than_eager
from tests.helpers.linear_shards import TOPK as LINEAR_TOPK
from tests.helpers.linear_shards import LinearCase, linear_cases
from tests.helpers.linear_shards import measuring as linear_measuring
from tests.helpers.vocab_parallel import TOPK, Case, cases, measuring, served, sizes_of

pytestmark = pytest.mark.timeout(400)  # of all, so that they stay in one process with the fixture
ROOT = Path(__file__).parents[2]
EAGER = KernelConfig(backend="eager")
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100])
HERE = ClassShard(first=5, num_classes=12)
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}
Found = list[dict[str, Any]]  # by rank: the results of each case by its name


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow, id=f"{n} ranks") for n in (2, 4)],
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of the ranks, computed once for all tests."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without torch.distributed or gloo")
    ranks = request.param
    folder = tmp_path_factory.mktemp(f"{ranks} ranks")
    module = "tests.helpers.vocab_parallel"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(ranks), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that waits for a dead peer would never end
    results = [folder / f"{rank}.pt" for rank in range(ranks)]
    assert all(path.exists() for path in results), "\n".join(errors)
    return [torch.load(path) for path in results]


def each_case(found: Found) -> Iterator[tuple[Case, list[Any]]]:
    """A case, and what each rank found."""
    number = 0
    for case in cases(len(found)):
        number += 1
        yield case, [rank[case.name] for rank in found]
    assert number > 30 * len(served(len(found)))


def whole(case: Case, **options: Any) -> tuple[Tensor, Tensor, Meter]:
    """Loss, gradient and counts without any division."""
    leaf = case.logits.clone().requires_grad_()
    meter = Meter("cpu", topk=TOPK)
    given = {**case.options, **options}
    loss = cross_entropy(leaf, case.targets, **given, meter=meter, config=EAGER)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad, meter


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Compare up to the rounding of a dtype; NaN where NaN is expected."""
    bound = ROUNDING[dtype]
    torch.testing.assert_close(
        actual, expected, rtol=bound, atol=bound, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def test_the_loss_is_that_of_all_classes_on_every_rank(found: Found) -> None:
    for case, ranks in each_case(found):
        loss, _, _ = whole(case)
        rows, _, _ = whole(case, reduction="none", normalizer=None)
        dtype = loss.dtype  # float32 for half precision
        for rank in ranks:
            near(rank["loss"], loss, dtype, case.name)
            near(rank["rows"], rows, dtype, case.name)
            assert torch.equal(rank["loss"].nan_to_num(), ranks[0]["loss"].nan_to_num()), case.name


def test_each_rank_has_the_gradient_of_its_classes(found: Found) -> None:
    for case, ranks in each_case(found):
        _, grad, _ = whole(case)
        step = cross_entropy_step(
            case.logits, case.targets, None, **case.options, grad_scale=3.0, config=EAGER
        )
        dtype = case.logits.dtype
        for rank in ranks:
            for into in rank["step into memory"]:
                near(into, rank["step"], torch.float64, case.name)
        near(torch.cat([rank["grad"] for rank in ranks], -1), grad, dtype, case.name)
        near(torch.cat([rank["step"] for rank in ranks], -1), step, dtype, case.name)


def test_every_rank_counts_the_whole_batch(found: Found) -> None:
    for case, ranks in each_case(found):
        _, _, meter = whole(case)
        for rank in ranks:
            assert torch.equal(rank["meter"]["counts"], meter.counts), case.name
            near(rank["meter"]["sums"], meter.sums, torch.float32, case.name)


def test_every_rank_measures_the_whole_batch(found: Found) -> None:
    for case, ranks in each_case(found):
        meter = measuring(case.logits.shape[-1], TOPK)
        cross_entropy(case.logits, case.targets, **case.options, meter=meter, config=EAGER)
        for rank in ranks:
            assert torch.equal(rank["measures"]["counts"], meter.counts), case.name
            near(rank["measures"]["sums"], meter.sums, torch.float32, case.name)


def test_shards_are_found_from_their_sizes(found: Found) -> None:
    for case, ranks in each_case(found):
        sizes = sizes_of(case.name, case.logits.shape[-1], len(found))
        for number, rank in enumerate(ranks):
            assert rank["shard"] == (sum(sizes[:number]), case.logits.shape[-1])


def test_a_loss_takes_up_to_three_collectives_and_its_gradient_none(found: Found) -> None:
    for case, ranks in each_case(found):
        assert [rank["collectives"] for rank in ranks] == [[2, 0, 1, 2]] * len(found), case.name


def test_dtensors_give_their_shard_and_receive_the_gradient(found: Found) -> None:
    for rank in found:
        leaf = rank["DTensor"]["whole"].requires_grad_()
        meter = Meter("cpu", per_class=10, calibration_bins=3, entropy=True)
        cross_entropy(leaf, rank["DTensor"]["targets"], meter=meter, config=EAGER).backward()
        torch.testing.assert_close(rank["DTensor"]["grad"], leaf.grad)
        assert torch.equal(rank["DTensor"]["measures"]["counts"], meter.counts)
        near(rank["DTensor"]["measures"]["sums"], meter.sums, torch.float32, "DTensor")
        assert rank["DTensor"]["refusal"].startswith("every rank must hold at least one class")


# --- the linear form ---


def undivided(case: LinearCase, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Meter]:
    """Loss, gradients and counts of the definition, without any division."""
    given = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    leaves = [x.to(dtype).requires_grad_() for x in given]
    bias = leaves[2] if len(leaves) > 2 else None
    meter = Meter("cpu", topk=LINEAR_TOPK)
    loss = linear_cross_entropy(
        *leaves[:2], case.targets, bias=bias, **case.options, meter=meter, config=EAGER
    )
    return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves)), meter


def joined(ranks: list[Any], kind: str) -> list[Tensor]:
    """The gradient of hidden, the same on all ranks, and those of weight and bias put together."""
    hidden, *parts = zip(*(rank[kind] for rank in ranks), strict=True)
    assert all(torch.equal(x.nan_to_num(), hidden[0].nan_to_num()) for x in hidden)
    return [hidden[0], *(torch.cat(part) for part in parts)]


def test_the_linear_form_has_the_loss_and_gradients_of_all_classes(found: Found) -> None:
    for case in linear_cases(served(len(found))):
        ranks = [rank[case.name] for rank in found]
        exact, grads, _ = undivided(case, torch.float64)
        rival, eager_grads, _ = undivided(case, case.weight.dtype)
        for rank in ranks:
            near(rank["loss"], exact.to(rival.dtype), torch.float32, case.name)
            assert torch.equal(rank["loss"].nan_to_num(), ranks[0]["loss"].nan_to_num())
        kinds = ["grads"] + (["steps"] if ranks[0]["steps"] else [])
        for kind in kinds:
            for ours, eager, truth in zip(joined(ranks, kind), eager_grads, grads, strict=True):
                assert_no_worse_than_eager(ours, eager, truth)


def test_the_linear_form_counts_the_whole_batch_on_every_rank(found: Found) -> None:
    for case in linear_cases(served(len(found))):
        _, _, meter = undivided(case, torch.float64)
        for rank in found:
            assert torch.equal(rank[case.name]["meter"]["counts"], meter.counts), case.name
            near(rank[case.name]["meter"]["sums"], meter.sums, torch.float32, case.name)


def test_the_linear_form_measures_the_whole_batch(found: Found) -> None:
    for case in linear_cases(served(len(found))):
        meter = linear_measuring()
        given = [None if x is None else x.double() for x in (case.hidden, case.weight, case.bias)]
        hidden, weight, bias = given
        assert hidden is not None
        assert weight is not None
        linear_cross_entropy(
            hidden, weight, case.targets, bias=bias, **case.options, meter=meter, config=EAGER
        )
        for rank in found:
            assert torch.equal(rank[case.name]["measures"]["counts"], meter.counts), case.name
            near(rank[case.name]["measures"]["sums"], meter.sums, torch.float32, case.name)


def test_the_linear_form_takes_two_collectives_per_chunk_and_one_for_hidden(found: Found) -> None:
    for case in linear_cases(served(len(found))):
        rows = case.targets.numel()
        chunks = 1 if case.weight.dtype == torch.float64 else -(-rows // 7)
        called, measuring_called = found[0][case.name]["collectives"]
        assert called.count("all_reduce") == 1, case.name
        is_twice = case.weight.dtype == torch.float16 or "per row" in case.name
        if not is_twice:  # the logits are computed again in the backward pass
            assert called.count("all_gather") == 2 * chunks, case.name
        assert measuring_called.count("all_gather") == 2 * chunks, case.name


def test_the_linear_form_takes_the_weight_of_a_dtensor(found: Found) -> None:
    for rank in found:
        case = rank["linear DTensor"]
        leaves = [case[name].requires_grad_() for name in ("hidden", "whole")]
        linear_cross_entropy(*leaves, case["targets"], config=EAGER).backward()
        for ours, leaf in zip(case["grads"], leaves, strict=True):
            torch.testing.assert_close(ours, leaf.grad)


# --- what a rank refuses by itself, before it communicates ---


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shard": 5}, TypeError, "shard must be a ClassShard, got int 5"),
        ({"shard": ClassShard(8, 12)}, ValueError, "at most 4 classes from 8 on, of 12"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be.*\[12\].*\(5,\)"),
        ({"targets": T + 8}, IndexError, r"target 12 of row \(4,\) is outside \[0, 12\)"),
        ({"logits": X.long()}, TypeError, "logits must be one of"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be in"),
        ({"meter": 3}, TypeError, "meter must be a Meter"),
        ({"config": KernelConfig(backend="cuda")}, ValueError, "no kernels for logits whose"),
        ({"class_dim": 1}, TypeError, "unexpected keyword argument 'class_dim'"),
        ({"targets2": T}, TypeError, "targets2 goes with share"),
        ({"targets2": T + 8, "share": 0.5}, IndexError, "targets2: target 12"),
        ({"targets2": T, "share": 1.5}, ValueError, "share must be in"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    meter = Meter("cpu")
    given = {"logits": X, "targets": T, "shard": HERE, "meter": meter, **change}
    for call in (vocab_parallel_cross_entropy, vocab_parallel_cross_entropy_step):
        with pytest.raises(error, match=words):
            call(**given)
    assert not meter.counts.any()


def test_a_step_refuses_memory_as_that_of_all_classes_does() -> None:
    for change, words in (
        ({"out": torch.zeros(5, 6)}, "out must be like the logits"),
        ({"out": X}, "out overlaps the logits"),
        ({"out": torch.zeros(6, 5), "inplace": True}, "expected out or inplace=True, got both"),
        ({"reduction": "none"}, "takes reduction 'mean' or 'sum'"),
        ({"grad_scale": "1"}, "grad_scale"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            vocab_parallel_cross_entropy_step(X, T, None, HERE, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "num_classes"), [(-1, 5), (5, 5), (0, 0)])
def test_a_shard_lies_among_the_classes(first: int, num_classes: int) -> None:
    with pytest.raises(ValueError, match="first must be in"):
        ClassShard(first, num_classes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shard": 5}, TypeError, "shard must be a ClassShard, got int 5"),
        ({"shard": ClassShard(8, 12)}, ValueError, "at most 4 classes .* got weight with 5"),
        ({"class_weight": torch.ones(5)}, ValueError, r"class_weight must be.*\[12\].*\(5,\)"),
        ({"targets": T + 8}, IndexError, r"target 12 of row .* is outside \[0, 12\)"),
        ({"targets2": T + 8, "share": 0.5}, IndexError, "targets2: target 12"),
        ({"config": KernelConfig(backend="cuda")}, ValueError, "no kernels for logits whose"),
    ],
    ids=str,
)
def test_the_linear_form_names_bad_arguments(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    weight = torch.ones(5, 5, requires_grad=True)
    meter = Meter("cpu")
    given = {"hidden": X, "weight": weight, "targets": T, "shard": HERE, "meter": meter, **change}
    for call in (linear_cross_entropy, linear_cross_entropy_step):
        with pytest.raises(error, match=words):
            call(**given)
    assert not meter.counts.any()


def test_the_linear_form_is_no_part_of_a_compiled_graph() -> None:
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(X, torch.ones(5, 5), T, shard=HERE)
    torch._dynamo.reset()


def test_transforms_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="vocab_parallel_cross_entropy does not work"):
        torch.func.grad(lambda x: vocab_parallel_cross_entropy(x, T, HERE))(X)


def test_a_compiled_graph_ends_before_it() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(vocab_parallel_cross_entropy, backend="eager", fullgraph=True)(X, T, HERE)
    torch._dynamo.reset()
