"""Ignored, bad, non-finite and ordinary rows, and calls that are refused before anything is
written.

Long file: one table of inputs after the other.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, record_loss
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.testing import plain_torch_cross_entropy

INF = torch.inf
NAN = torch.nan
PLAIN = Options(None, -100, 0.0, 0.0, None, "mean", None)


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


@pytest.mark.parametrize(
    "row", [[NAN, 0, 0], [0, INF, 0], [INF, 0, 0], [INF, INF, 0], [-INF] * 3, [0, NAN, INF]]
)
def test_nonfinite_row_is_valid_nan_and_never_correct(
    config: KernelConfig, row: list[float]
) -> None:
    logits = leaf([row, [2.0, 0, 0]])
    meter = Meter("cpu", topk=(3,))
    losses = cross_entropy(
        logits, torch.tensor([0, 0]), reduction="none", meter=meter, config=config
    )
    losses.sum().backward()
    assert logits.grad is not None
    assert losses.isnan().tolist() == [True, False]
    assert logits.grad.isnan().all(1).tolist() == [True, False]
    result = meter.compute()
    assert (result.valid, result.nonfinite, result.correct) == (2, 1, {1: 1, 3: 1})


@pytest.mark.parametrize(
    "bits", [0x7FC00000, -0x400000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1], ids=hex
)
def test_every_nan_is_a_nan(config: KernelConfig, bits: int) -> None:
    """Sign and payload do not matter: -1 is memory filled with ones."""
    for classes in (3, 40):
        logits = torch.zeros(2, classes)
        meter = Meter("cpu")
        logits[0, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        grad = cross_entropy_step(logits, torch.tensor([0, 0]), meter, config=config)
        assert grad.isnan().all(1).tolist() == [True, False]
        assert (meter.compute().nonfinite, meter.compute().correct[1]) == (1, 1)


def test_inf_is_judged_after_softcap(config: KernelConfig) -> None:
    logits = leaf([[INF, 0, -INF], [-INF] * 3, [NAN, 0, 0]])
    meter = Meter("cpu")
    cross_entropy(logits, torch.tensor([0, 0, 0]), softcap=2.0, meter=meter, config=config)
    result = meter.compute()
    assert (result.nonfinite, result.correct[1]) == (1, 2)


def test_minus_inf_at_the_target_is_infinite_loss_with_finite_gradient(
    config: KernelConfig,
) -> None:
    logits = leaf([[-INF, 0.0, 0.0]])
    meter = Meter("cpu", topk=(3,))
    loss = cross_entropy(logits, torch.tensor([0]), meter=meter, config=config)
    loss.backward()
    assert loss.item() == INF
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]]))
    assert (meter.compute().nonfinite, meter.compute().correct) == (0, {1: 0, 3: 1})


def test_logits_of_ignored_rows_are_not_looked_at(config: KernelConfig) -> None:
    logits = leaf([[NAN, INF, 0], [0.0, 0, 0], [-INF] * 3])
    meter = Meter("cpu")
    targets = torch.tensor([-100, 1, -100])
    loss = cross_entropy(
        logits, targets, meter=meter, z_loss=1.0, label_smoothing=0.1, softcap=9.0, config=config
    )
    loss.backward()
    assert loss.item() == pytest.approx(1.0986122886681098 + 1.2069489608396303)  # ln 3 + (ln 3)^2
    assert logits.grad is not None
    assert logits.grad[[0, 2]].eq(0).all()
    assert (meter.compute().valid, meter.compute().ignored, meter.compute().nonfinite) == (1, 2, 0)


def test_ignore_index_may_be_a_class(config: KernelConfig) -> None:
    meter = Meter("cpu")
    cross_entropy(
        leaf([[9.0, 0], [9.0, 0]]), torch.tensor([0, 1]), ignore_index=0, meter=meter, config=config
    )
    assert (meter.compute().valid, meter.compute().ignored, meter.compute().correct[1]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("row", "target", "rank"),
    [
        ([3.0, 2, 1], 0, 0),
        ([3.0, 2, 1], 2, 2),
        ([1.0, 1, 1], 0, 0),  # of equal logits the first wins, as in argmax
        ([1.0, 1, 1], 2, 2),
        ([2.0, 1, 2], 1, 2),
        ([-INF, 0, -INF], 2, 2),
        ([5.0, -0.0, 0.0], 2, 2),  # -0.0 equals 0.0
    ],
)
def test_rank_counts_larger_logits_and_earlier_equals(
    config: KernelConfig, row: list[float], target: int, rank: int
) -> None:
    meter = Meter("cpu", topk=(2, 3, 50))
    cross_entropy(torch.tensor([row]), torch.tensor([target]), meter=meter, config=config)
    assert meter.compute().correct == {k: int(rank < k) for k in (1, 2, 3, 50)}


def test_rank_uses_the_logits_before_softcap(config: KernelConfig) -> None:
    """Both saturate at softcap 1 in float32, where the first would win the tie."""
    meter = Meter("cpu")
    cross_entropy(
        torch.tensor([[50.0, 60.0]]), torch.tensor([1]), softcap=1.0, meter=meter, config=config
    )
    assert meter.compute().accuracy == 1


finite_or_not = st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 1e4, -1e4, INF, -INF, NAN])


@settings(max_examples=60)
@given(
    data=st.data(),
    rows=st.integers(0, 5),
    classes=st.integers(1, 6),
    ignore_index=st.sampled_from([-100, 0, 2]),
)
def test_any_rows_agree_with_torch_and_a_slow_count(
    data: st.DataObject, rows: int, classes: int, ignore_index: int
) -> None:
    row_values = st.lists(finite_or_not, min_size=classes, max_size=classes)
    values = data.draw(st.lists(row_values, min_size=rows, max_size=rows))
    any_target = st.one_of(st.integers(0, classes - 1), st.just(ignore_index))
    targets = data.draw(st.lists(any_target, min_size=rows, max_size=rows))
    logits = torch.tensor(values, dtype=torch.float64).reshape(rows, classes)
    meter = Meter("cpu", topk=(2,))
    kept = [i for i in range(rows) if targets[i] != ignore_index]
    target_tensor = torch.tensor(targets, dtype=torch.int64)
    losses = cross_entropy(
        logits, target_tensor, reduction="none", ignore_index=ignore_index, meter=meter
    )
    expected = plain_torch_cross_entropy(
        logits, target_tensor, reduction="none", ignore_index=ignore_index
    )
    torch.testing.assert_close(losses, expected, equal_nan=True)

    bad_row = [
        any(x != x or x == INF for x in values[i]) or set(values[i]) == {-INF} for i in range(rows)
    ]
    ranked = {
        i: sorted(range(classes), key=lambda c: (-values[i][c], c)) for i in kept if not bad_row[i]
    }
    result = meter.compute()
    assert (result.valid, result.ignored) == (len(kept), rows - len(kept))
    assert result.nonfinite == sum(bad_row[i] for i in kept)
    assert result.correct == {k: sum(targets[i] in ranked[i][:k] for i in ranked) for k in (1, 2)}


# --- bad targets ---


def calls(
    logits: Tensor, targets: Tensor, meter: Meter | None, config: KernelConfig
) -> dict[str, Any]:
    return {
        "cross_entropy": lambda **o: cross_entropy(
            logits, targets, meter=meter, config=config, **o
        ),
        "cross_entropy_step": lambda **o: cross_entropy_step(
            logits, targets, meter, config=config, **o
        ),
        "record_loss": lambda **o: record_loss(
            torch.tensor(1.0), logits, targets, meter or Meter("cpu"), **o
        ),
    }


@pytest.mark.parametrize("value", [3, -1, -99, 2**40])
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_step", "record_loss"])
def test_bad_target_on_the_cpu_raises_and_touches_nothing(
    config: KernelConfig, name: str, value: int
) -> None:
    logits = torch.zeros(2, 2, 3)
    meter = Meter("cpu")
    targets = torch.tensor([[0, -100], [value, value]])
    with pytest.raises(
        IndexError, match=rf"target {value} of row \(1, 0\) is outside \[0, 3\).*2 such rows"
    ):
        calls(logits, targets, meter, config)[name]()
    assert meter.counts.eq(0).all()
    assert meter.sums.eq(0).all()


def test_bad_target_leaves_out_and_logits_untouched(config: KernelConfig) -> None:
    logits = torch.ones(1, 3)
    out = torch.full((1, 3), 7.0)
    for options in ({"out": out}, {"inplace": True}):
        with pytest.raises(IndexError):
            cross_entropy_step(logits, torch.tensor([5]), None, **options, config=config)
    assert logits.eq(1).all()
    assert out.eq(7).all()
    assert (logits._version, out._version) == (0, 0)


def test_uint8_target_is_not_mistaken_for_ignore_index(config: KernelConfig) -> None:
    with pytest.raises(IndexError, match="target 156"):
        cross_entropy(torch.zeros(1, 3), torch.tensor([156], dtype=torch.uint8), config=config)


def test_options_get_no_gradient_and_the_meter_no_graph(config: KernelConfig) -> None:
    number = torch.tensor(0.5, requires_grad=True)
    meter = Meter("cpu")
    options = {
        "weight": torch.ones(3, requires_grad=True),
        "label_smoothing": number,
        "z_loss": number,
    }
    loss = cross_entropy(X, T, **options, normalizer=number, meter=meter, config=config)
    assert not loss.requires_grad
    assert not meter.sums.requires_grad


def test_bad_targets_on_other_devices_are_left_out_and_counted() -> None:
    """The reference knows no device, so what it does with them on a GPU shows on the CPU."""
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0]])
    targets = torch.tensor([0, 2, -7])
    meter = Meter("cpu")
    result = reference.forward(logits, targets, PLAIN, meter)
    assert result.loss.item() == pytest.approx(0.6931471805599453)  # ln 2: the first row alone
    grad = reference.backward(torch.tensor(1.0), logits, targets, *result[1:], PLAIN)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]))
    assert reference.forward(logits, targets, PLAIN, None).loss.isnan()
    none = PLAIN._replace(reduction="none")
    assert reference.forward(logits, targets, none, None).loss.isnan().tolist() == [
        False,
        True,
        True,
    ]
    assert reference.forward(logits, targets, none, meter).loss[1:].tolist() == [0, 0]

    with pytest.raises(IndexError, match=r"4 targets .* compute\(strict=False\)"):
        meter.compute()
    lenient = meter.compute(strict=False)
    assert (lenient.bad_targets, lenient.valid, lenient.correct[1], lenient.batches) == (4, 2, 2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_bad_target_on_a_gpu_neither_raises_nor_syncs(config: KernelConfig) -> None:
    logits = torch.zeros(2, 3, device="cuda", requires_grad=True)
    meter = Meter("cuda")
    targets = torch.tensor([0, 99], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(logits, targets, meter=meter, config=config).backward()
        unmetered = cross_entropy(logits, targets, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.grad is not None
    assert logits.grad[1].eq(0).all()
    assert unmetered.isnan()
    assert meter.compute(strict=False).bad_targets == 1


# --- refused arguments ---

X = torch.zeros(2, 3)
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "targets", "error", "words"),
    [
        ([[0.0]], T, TypeError, "logits must be a dense tensor.*list.*torch.as_tensor"),
        ((X, X), T, TypeError, r"logits must be a dense tensor.*tuple.*such as output\[0\]"),
        ({"logits": X}, T, TypeError, "got dict.*such as output.logits"),
        (torch.nn.Linear(1, 1), T, TypeError, "got Linear.*such as layer.weight"),
        (X.to_sparse(), T, TypeError, r"logits must be a dense tensor.*sparse.*to_dense\(\)"),
        (T, X, TypeError, "got torch.int64; are logits and targets swapped"),
        (X, [0, 1], TypeError, "targets must be a dense tensor.*list"),
        (X.long(), T, TypeError, "logits must be one of.*float32.*got torch.int64"),
        (X.to(torch.complex64), T, TypeError, "got torch.complex64"),
        (torch.tensor(0.0), torch.tensor(0), ValueError, r"V of at least 1, got shape \(\)"),
        (torch.zeros(2, 0), T, ValueError, r"V of at least 1, got shape \(2, 0\)"),
        (X, torch.zeros(2, 3), TypeError, "soft .probability. targets are not served"),
        (X, T.float(), TypeError, r"class indices.*got torch.float32.*targets.long\(\)"),
        (X, X.long(), ValueError, r"got \(2, 3\); for one-hot targets pass targets.argmax"),
        (X, T[:, None], ValueError, r"got \(2, 1\); pass targets.squeeze\(-1\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), ValueError, "pass class_dim=1"),
        (X, T.bool(), TypeError, "class indices.*got torch.bool"),
        (X, T.to(torch.int16), TypeError, "class indices.*got torch.int16"),
        (
            X,
            torch.tensor([0, 1, 2]),
            ValueError,
            r"expected targets of shape \(2,\).*\(2, 3\).*got \(3,\)",
        ),
        (X.t(), torch.tensor([0, 1]), ValueError, r"expected targets of shape \(3,\)"),
    ],
)
def test_wrong_tensors_are_named(
    config: KernelConfig, logits: Any, targets: Any, error: type[Exception], words: str
) -> None:
    meter = Meter("cpu")
    for call in calls(logits, targets, meter, config).values():
        with pytest.raises(error, match=words):
            call()
    assert meter.counts.eq(0).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none', got 'avg'"),
        (
            {"reduction": "sum", "normalizer": 2.0},
            ValueError,
            "normalizer goes with reduction='mean' only",
        ),
        ({"normalizer": -1}, ValueError, r"normalizer must be in \[0.0, inf\], got -1"),
        ({"normalizer": NAN}, ValueError, "normalizer .* got nan"),
        ({"normalizer": "2"}, TypeError, "normalizer must be an int or a float, got str"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer as a tensor must be 0-d"),
        ({"normalizer": torch.ones((), device="meta")}, ValueError, "on cpu or the CPU.*meta"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0.0, 1.0\], got 1.1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": torch.ones(1)}, ValueError, "label_smoothing as a tensor must be 0-d"),
        ({"z_loss": -1e-4}, ValueError, "z_loss"),
        ({"z_loss": NAN}, ValueError, "z_loss"),
        ({"softcap": 0}, ValueError, r"softcap \(None for no cap\) must be in .* got 0"),
        ({"softcap": float("inf")}, ValueError, "softcap .* got inf"),
        ({"softcap": 1e300}, ValueError, r"in \[2\*\*-100, 2\*\*100\], got 1e\+300"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        (
            {"weight": torch.ones(2)},
            ValueError,
            r"weight must be a floating tensor of shape \[3\].*\(2,\)",
        ),
        (
            {"weight": torch.ones(3, dtype=torch.int64)},
            ValueError,
            "weight must be a floating tensor",
        ),
        (
            {"weight": torch.ones(3, device="meta")},
            ValueError,
            "weight must be on the logits' device cpu, got meta",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_named(
    config: KernelConfig, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    meter = Meter("cpu")
    for name in ("cross_entropy", "cross_entropy_step"):
        with pytest.raises(error, match=words):
            calls(X, T, meter, config)[name](**options)
    assert meter.counts.eq(0).all()


@pytest.mark.parametrize(
    ("logits", "targets", "meter", "places"),
    [
        ("cpu", "meta", "cpu", "logits on cpu, targets on meta, meter on cpu"),
        ("meta", "cpu", "cpu", "logits on meta, targets on cpu, meter on cpu"),
        ("cpu", "cpu", "meta", "logits on cpu, targets on cpu, meter on meta"),
    ],
)
def test_different_devices_are_all_named(
    config: KernelConfig, logits: str, targets: str, meter: str, places: str
) -> None:
    for call in calls(X.to(logits), T.to(targets), Meter(meter), config).values():
        with pytest.raises(ValueError, match=places):
            call()


def test_meta_tensors_give_shapes(config: KernelConfig) -> None:
    logits = torch.empty(4, 5, device="meta", requires_grad=True)
    targets = torch.empty(4, dtype=torch.int64, device="meta")
    if config.backend == "triton":
        with pytest.raises(ValueError, match="not on meta"):
            cross_entropy(logits, targets, config=config)
        return
    cross_entropy(logits, targets, meter=Meter("meta"), config=config).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (4, 5)
