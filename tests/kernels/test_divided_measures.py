"""Measures of a meter where the classes are divided: all shards in one process, beside the
definition for undivided classes in float64. test_vocab_parallel has processes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy
from esper_kernels.measures import MeasurePlan
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.measures import RowMeasures, add_measures, row_measures
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.vocab_parallel import ClassShard, cpp
from esper_kernels.ops.vocab_parallel import reference as eager
from esper_kernels.ops.vocab_parallel.combine import measures_of, sums_of
from esper_kernels.testing import cross_entropy_samples
from tests.helpers.class_shards import EVERY_BACKEND, EVERY_DAY, backend_module, needs_cpp

PLAN = MeasurePlan(per_class=0, calibration_bins=15, entropy=1, confusion=0)


@pytest.fixture(params=EVERY_DAY)
def module(request: pytest.FixtureRequest) -> Any:
    """Each backend, on CPU tensors."""
    return backend_module(request.param)


def divided(
    module: Any,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    sizes: list[int],
    plan: MeasurePlan = PLAN,
) -> RowMeasures:
    """The measures that ranks with these numbers of classes find."""
    sums = []
    for i, part in enumerate(logits.split(sizes, -1)):
        shard = ClassShard(sum(sizes[:i]), logits.shape[-1])
        found = module.class_sums(part, targets, options, None, plan, shard)
        assert found.shape == (eager.num_sums(plan), *targets.shape)
        # What a rank says of the loss does not depend on the measures.
        bare = module.class_sums(part, targets, options, None, None, shard)
        rows = targets != options.ignore_index
        assert bare[:, rows].nan_to_num().equal(found[: len(bare), rows].nan_to_num())
        sums.append(found)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gathered = torch.stack(sums)
    row_max = sums_of(gathered, options, dtype)[0].row_max
    measured = (targets != options.ignore_index) & row_max.isfinite()
    return measures_of(gathered, measured, plan, dtype)


def check(
    module: Any, logits: Tensor, targets: Tensor, options: Options, sizes: list[int]
) -> RowMeasures:
    """Compare with the definition in float64 without any division."""
    found = divided(module, logits, targets, options, sizes)
    rows = reference.classify(targets, logits.shape[-1], options.ignore_index)
    x = reference.capped(logits.double(), options.softcap)
    measured = rows.valid & x.amax(-1).isfinite()
    expected = row_measures(logits, x, rows.target, measured, PLAN)
    assert torch.equal(found.predicted, expected.predicted)
    for name, ours, truth in zip(
        ("confidence", "nll", "brier", "entropy", "margin"),
        (found.confidence.double(), *found.sums),
        (expected.confidence, *expected.sums),
        strict=True,
    ):
        torch.testing.assert_close(
            ours[measured], truth[measured], rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


def batch(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows with ties among all classes and at both ends, rows that are not finite or ignored, and
    rows where only one class is finite."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(14, classes, generator=generator)
    targets = torch.randint(classes, (14,), generator=generator)
    targets[0] = -100
    logits[1] = 2.0
    logits[2, [0, -1]] = 30.0
    logits[3, -1] = 30.0
    logits[4] = logits[4].round()
    logits[5, classes // 2] = torch.nan
    logits[6, -1] = torch.inf
    logits[7] = -torch.inf
    logits[8] = -torch.inf
    logits[8, classes // 2] = -2000.0
    logits[9, : classes // 2] = -torch.inf
    logits[10, classes // 2 :] = -torch.inf
    logits[11] += 10_000.0
    logits[12] = -torch.inf
    logits[12, -1] = 2000.0
    return logits.to(dtype), targets


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_measures_are_those_of_all_classes(
    module: Any, dtype: torch.dtype, softcap: float | None
) -> None:
    for sizes in ([1, 1], [1, 2, 1, 3], [31, 33], [1, 2048, 2051]):
        logits, targets = batch(sum(sizes), dtype)
        check(module, logits, targets, Options(softcap=softcap), sizes)


@needs_cpp
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("sizes", [[4096, 1, 4097], [1, 9000], [33, 1]], ids=str)
def test_every_instruction_set_measures_shards(name: str, sizes: list[int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, targets = batch(sum(sizes), dtype)
        check(cpp, logits, targets, Options(instruction_set=name), sizes)


def test_a_tie_is_predicted_as_the_lowest_class(module: Any) -> None:
    """Softcap also makes logits equal that were not: those as stored decide."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 3.0], [0.0, 900.0, 0.0, 0.0, 901.0, 901.0]])
    targets = torch.tensor([0, 1])
    for sizes in ([1, 5], [2, 1, 3], [3, 3], [4, 2], [1] * 6, [6]):
        found = divided(module, logits, targets, Options(softcap=5.0), sizes)
        assert found.predicted.tolist() == [1, 4]
        assert found.sums[-1].tolist() == [0.0, 0.0]  # the margin


def test_one_class_in_all_has_no_second_largest(module: Any) -> None:
    """With softcap, a second logit of -inf would become -softcap."""
    for softcap in (None, 5.0):
        found = divided(module, torch.ones(1, 1), torch.tensor([0]), Options(softcap=softcap), [1])
        assert found.sums[-1].tolist() == [torch.inf]


def test_every_sample_in_two_shards(module: Any) -> None:
    for sample in cross_entropy_samples():
        classes = sample.logits.shape[-1]
        sizes = [1, classes - 1] if classes > 1 else [1]
        check(module, sample.logits, sample.targets, Options(**sample.options), sizes)


@pytest.mark.parametrize("module", EVERY_BACKEND, indirect=True)
def test_entropy_is_left_out_where_it_is_not_wanted(module: Any) -> None:
    logits, targets = batch(40)
    plain = PLAN._replace(entropy=0)
    found = divided(module, logits, targets, Options(), [15, 25], plain)
    full = check(module, logits, targets, Options(), [15, 25])
    assert torch.equal(found.predicted, full.predicted)
    measured = found.predicted >= 0
    for ours, theirs in zip(found.sums[:2], full.sums[:2], strict=True):
        torch.testing.assert_close(ours[measured], theirs[measured], rtol=1e-6, atol=1e-6)
    assert not any(x.any() for x in found.sums[2:])


@needs_cpp
def test_bits_do_not_depend_on_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(700, 401, generator=generator)
    targets = torch.randint(401, (700,), generator=generator)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            meter = Meter("cpu", calibration_bins=15, entropy=True)
            rows = divided(cpp, logits, targets, Options(), [1, 400])
            add_measures(meter, targets, rows)
            found.append(meter.sums.view(torch.int64).tolist() + meter.counts.tolist())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    whole = Meter("cpu", calibration_bins=15, entropy=True)
    cross_entropy(logits, targets, meter=whole, config=KernelConfig(backend="cpp"))
    assert torch.equal(whole.counts[7:], meter.counts[7:])
    torch.testing.assert_close(whole.sums[3:], meter.sums[3:], rtol=1e-6, atol=0)
