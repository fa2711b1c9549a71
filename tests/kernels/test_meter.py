"""`Meter` and `compute_all`: what they count, how exactly, and how often the host waits."""

import io
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from esper_kernels import (
    KernelConfig,
    Meter,
    clip_grad_norm_,
    compute_all,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    record_loss,
)
from esper_kernels.testing import SyncCounter
from tests.helpers.meters import meters_of_a_rank
from tests.helpers.ranks import together

LN2 = 0.6931471805599453


def test_two_batches_by_hand(config: KernelConfig, device: str) -> None:
    """Two equal logits cost ln 2, and the first class wins the tie; [ln 3, 0] costs ln(4/3) or ln
    4."""
    meter = Meter(device, topk=(2,))
    even = [0.0, 0.0]
    uneven = [math.log(3), 0.0]
    batches = [([even, even, uneven], [0, 1, 0]), ([uneven, even], [1, -100])]
    for rows, targets in batches:
        cross_entropy_step(
            torch.tensor(rows, device=device),
            torch.tensor(targets, device=device),
            meter,
            config=config,
        )
    result = meter.compute()
    first = 2 * LN2 + math.log(4 / 3)
    second = math.log(4)
    assert result.loss_sum == pytest.approx(first + second, rel=1e-6)
    assert result.loss == pytest.approx((first + second) / 4, rel=1e-6)
    assert result.mean_batch_loss == pytest.approx((first / 3 + second) / 2, rel=1e-6)
    assert result.correct == {1: 2, 2: 4}
    assert result.accuracy == 0.5
    assert (result.valid, result.ignored, result.nonfinite, result.bad_targets) == (4, 1, 0, 0)
    assert result.batches == 2


def test_class_weights_weigh_the_loss_but_not_the_counts(config: KernelConfig) -> None:
    meter = Meter("cpu")
    weight = torch.tensor([1.0, 3.0])
    cross_entropy(
        torch.tensor([[0.0, 0], [math.log(3), 0]]),
        torch.tensor([0, 1]),
        weight=weight,
        meter=meter,
        config=config,
    )
    result = meter.compute()
    assert result.loss_sum == pytest.approx(LN2 + 3 * math.log(4), rel=1e-6)
    assert result.loss == pytest.approx((LN2 + 3 * math.log(4)) / 4, rel=1e-6)
    assert (result.valid, result.accuracy) == (2, 0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_does_not_enter_the_meter(config: KernelConfig, reduction: str) -> None:
    meter = Meter("cpu")
    cross_entropy(
        torch.zeros(3, 2),
        torch.tensor([0, 1, -100]),
        reduction=reduction,
        meter=meter,
        config=config,
    )
    assert meter.compute().loss_sum == pytest.approx(2 * LN2)


def test_mean_over_nothing_is_nan() -> None:
    empty = Meter("cpu").compute()
    assert math.isnan(empty.loss)
    assert math.isnan(empty.mean_batch_loss)
    assert math.isnan(empty.accuracy)
    assert (empty.loss_sum, empty.valid, empty.batches, empty.correct) == (0, 0, 0, {1: 0})


def test_batches_without_a_valid_row_do_not_enter_the_mean(config: KernelConfig) -> None:
    meter = Meter("cpu")
    cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), meter=meter, config=config)
    cross_entropy(torch.zeros(2, 2), torch.tensor([-100, -100]), meter=meter, config=config)
    cross_entropy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), meter=meter, config=config)
    result = meter.compute()
    assert result.mean_batch_loss == pytest.approx(LN2)
    assert (result.batches, result.ignored) == (3, 2)


def test_counts_are_exact_past_2_to_the_31(config: KernelConfig) -> None:
    meter = Meter("cpu")
    meter.counts.fill_(2**40)
    meter.sums[1] = 2.0**40
    cross_entropy(torch.zeros(3, 2), torch.tensor([0, 0, 1]), meter=meter, config=config)
    result = meter.compute(strict=False)
    assert (result.valid, result.correct[1], result.batches) == (2**40 + 3, 2**40 + 2, 2**40 + 1)


def test_splitting_a_batch_changes_no_count(config: KernelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=generator)
    targets = torch.randint(10, (64,), generator=generator)
    whole = Meter("cpu", topk=(5,))
    parts = Meter("cpu", topk=(5,))
    cross_entropy_step(logits, targets, whole, config=config)
    for part in range(0, 64, 7):
        cross_entropy_step(logits[part : part + 7], targets[part : part + 7], parts, config=config)
    assert parts.compute().correct == whole.compute().correct
    assert parts.compute().loss == pytest.approx(whole.compute().loss, rel=1e-12)


def test_reset_forgets(config: KernelConfig) -> None:
    meter = Meter("cpu")
    cross_entropy_step(torch.zeros(3, 2), torch.tensor([0, 0, 1]), meter, config=config)
    meter.reset()
    assert meter.compute().batches == 0
    assert meter.sums.eq(0).all()


def test_topk_is_sorted_and_holds_1() -> None:
    assert Meter("cpu", topk=(5, 3, 5)).topk == (1, 3, 5)
    assert Meter("cpu", topk=()).topk == (1,)
    for topk in ((0,), (-1,), (2**63,)):
        with pytest.raises(ValueError, match="topk must hold positive integers"):
            Meter("cpu", topk=topk)


def test_device_without_float64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float64, which 'mps' lacks"):
        Meter("mps")


# --- record_loss ---


def test_record_loss_counts_as_cross_entropy_does(config: KernelConfig) -> None:
    logits = torch.tensor([[2.0, 0], [0, 2], [torch.nan, 0], [5, 5], [0, 0]])
    targets = torch.tensor([0, 0, 1, -100, 1])
    recorded = Meter("cpu", topk=(2,))
    own = Meter("cpu", topk=(2,))
    record_loss(torch.tensor(0.5), logits, targets, recorded)
    cross_entropy(logits, targets, meter=own, config=config)
    assert torch.equal(recorded.counts, own.counts)
    # 0.5 * 4 valid rows; 4 rows; one batch of mean 0.5
    assert recorded.sums.tolist() == [2.0, 4.0, 0.5]


def test_record_loss_of_nothing_valid_adds_nothing() -> None:
    meter = Meter("cpu")
    record_loss(torch.tensor(torch.nan), torch.zeros(2, 3), torch.tensor([-100, -100]), meter)
    assert meter.sums.tolist() == [0, 0, 0]
    assert (meter.compute().ignored, meter.compute().batches) == (2, 1)


def test_record_loss_takes_a_loss_that_requires_grad() -> None:
    meter = Meter("cpu")
    loss = torch.tensor(2.0, requires_grad=True)
    record_loss(
        loss, torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]), meter, ignore_index=1
    )
    assert not meter.sums.requires_grad
    assert meter.compute().loss == 2


def test_record_loss_refuses_what_is_no_mean_loss() -> None:
    meter = Meter("cpu")
    for loss in (torch.zeros(2), torch.tensor(1), 1.0):
        with pytest.raises(TypeError, match="loss must be a 0-d floating tensor"):
            record_loss(loss, torch.zeros(2, 3), torch.tensor([0, 1]), meter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss must be on the logits' device cpu, got meta"):
        record_loss(torch.zeros((), device="meta"), torch.zeros(2, 3), torch.tensor([0, 1]), meter)
    assert meter.counts.eq(0).all()


# --- reading ---


def test_an_epoch_waits_for_the_device_once(config: KernelConfig, device: str) -> None:
    meter = Meter(device, topk=(5,))
    model = torch.nn.Linear(8, 10).to(device)
    inputs = torch.randn(16, 8, device=device)
    targets = torch.zeros(16, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = None
    extra = torch.tensor([1.5, 2.5], dtype=torch.float64, device=device)
    with SyncCounter() as syncs:
        for batch in range(4):
            optimizer.zero_grad()
            logits = model(inputs)
            if batch % 2:
                cross_entropy(logits, targets, meter=meter, config=config).backward()
            else:
                logits.backward(
                    cross_entropy_step(logits, targets, meter, inplace=True, config=config)
                )
            grads = [parameter.grad for parameter in model.parameters()]
            stats = grad_stats({"all": grads}, out=stats, config=config)
            clip_grad_norm_(model.parameters(), 1.0, stats=stats, config=config)
            optimizer.step()
        assert syncs.count == 0
        assert stats is not None
        result, health, numbers, ints = compute_all(
            meter, stats, extra, torch.arange(4, device=device).view(2, 2)
        )
        assert syncs.count == 1
    assert result == meter.compute()
    assert health == stats.compute()
    assert (numbers, ints) == ([1.5, 2.5], [0, 1, 2, 3])


def test_the_sync_counter_sees_every_way_to_read() -> None:
    x = torch.ones(3)
    reads = [x.tolist, x[0].item, x[0].tolist, lambda: bool(x[0]), lambda: float(x[0]), x.numpy]
    for number, read in enumerate(reads):
        with SyncCounter() as syncs:
            read()
            (x + 1).sum()
        assert syncs.count == 1, number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_sync_counter_sees_copies_and_value_dependent_sizes() -> None:
    x = torch.ones(3, device="cuda")
    for read in (x.cpu, x.nonzero, lambda: x[x > 0], lambda: torch.zeros(3).copy_(x)):
        with SyncCounter() as syncs:
            read()
        assert syncs.count >= 1


def test_compute_all_keeps_every_bit() -> None:
    floats = torch.tensor([0.1, -0.0, 1e-310, torch.inf, 2.0**60 + 256], dtype=torch.float64)
    ints = torch.tensor([2**62 + 1, -1])
    read_floats, read_ints = compute_all(floats, ints)
    assert (read_floats, read_ints) == (floats.tolist(), ints.tolist())
    assert math.copysign(1, read_floats[1]) == -1
    assert math.isnan(compute_all(torch.tensor(torch.nan, dtype=torch.float64))[0][0])
    assert compute_all() == ()


def test_compute_all_refuses_other_sources_dtypes_and_mixed_devices() -> None:
    with pytest.raises(TypeError, match=r"got a list; of a list pass compute_all\(\*sources\)"):
        compute_all([Meter("cpu")])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"int64 and float64 tensors, got torch\.float32"):
        compute_all(torch.ones(2))
    with pytest.raises(ValueError, match=r"one device at a time.*'cpu', 'meta'"):
        compute_all(Meter("cpu"), Meter("meta"))


# --- state and ranks ---


def filled() -> Meter:
    meter = Meter("cpu", topk=(2,))
    cross_entropy_step(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([2]), meter)
    return meter


def test_state_survives_saving_with_weights_only() -> None:
    meter = filled()
    file = io.BytesIO()
    torch.save(meter.state_dict(), file)
    file.seek(0)
    loaded = Meter("cpu", topk=(2,))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.compute() == meter.compute()


def test_state_is_a_copy() -> None:
    meter = filled()
    state = meter.state_dict()
    meter.reset()
    meter.load_state_dict(state)
    assert meter.compute() == filled().compute()


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without \['counts', 'sums', 'topk'\]"):
        Meter("cpu").load_state_dict(torch.nn.Linear(1, 1).state_dict())


def test_state_of_another_topk_is_refused() -> None:
    meter = Meter("cpu", topk=(3,))
    with pytest.raises(ValueError, match=r"topk \(1, 3\), got topk \(1, 2\)"):
        meter.load_state_dict(filled().state_dict())
    assert meter.counts.eq(0).all()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_all_reduce_counts_every_row_of_two_ranks_once(tmp_path: Path) -> None:
    """Rank 0 has one row per batch, which is right; rank 1 has two, which are wrong; each costs
    ln 2."""
    found, other = together(2, meters_of_a_rank, tmp_path)
    assert {**found, "another group": ""} == {**other, "another group": ""}
    assert found.pop("another group") == (
        "expected the group of ranks (0, 1), which this meter has added up, got ranks (0,); reset "
        "it first, or add up once, over one group of all ranks"
    )
    assert found.pop("measures") == [(1, 2), (0, 3)]
    assert found["twice"] == found["once"]
    once, again = [3, 1, 2, 3 * LN2], [6, 2, 4, 6 * LN2]
    expected = {
        **dict.fromkeys(["once", "twice", "reset"], once),
        **dict.fromkeys(["another batch", "loaded from rank 0", "in a compiled graph"], again),
        "infinite": [2, 1, 2, math.inf],
    }
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
