"""Additional measures of a `Meter`, against float64 by hand, torchmetrics and scikit-learn.

Long file: one batch with every kind of row serves all measures and all ops.
"""

import io
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from esper_kernels import (
    ClassShard,
    KernelConfig,
    Meter,
    MeterResult,
    cross_entropy,
    cross_entropy_step,
    linear_cross_entropy_step,
    record_loss,
    vocab_parallel_cross_entropy,
)

torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
BINS = 15


def batch(rows: int, classes: int, *, odd: bool = True) -> tuple[Tensor, Tensor]:
    """Logits and targets; with ties, ignored rows and rows that are not finite if `odd`."""
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes, generator=generator) * 2
    targets = torch.randint(classes, (rows,), generator=generator)
    # half of the predictions are right, so that no class and no bin stays empty for long
    logits[range(0, rows, 2), targets[::2]] += 3
    if odd:
        logits[1::5] = logits[1::5].round()  # ties
        targets[2::7] = -100
        logits[3::11, 0] = torch.nan
        logits[4::13, classes - 1] = torch.inf
        logits[5::17] = -torch.inf
        logits[6::19, classes // 2] = -torch.inf
    return logits, targets


def metered(
    logits: Tensor, targets: Tensor, config: KernelConfig, *, confusion: bool = False, **options
) -> MeterResult:
    meter = Meter(
        "cpu",
        per_class=logits.shape[-1],
        calibration_bins=BINS,
        entropy=True,
        confusion=confusion,
    )
    half = len(logits) // 2
    for rows in (slice(0, half), slice(half, None)):
        cross_entropy(logits[rows], targets[rows], meter=meter, config=config, **options)
    return meter.compute()


def kept(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The measured rows, in float64."""
    finite = logits.double().amax(-1).isfinite()
    rows = (targets != -100) & finite
    return logits[rows].double(), targets[rows]


@pytest.mark.parametrize("classes", [2, 10, 33, 1000])
def test_measures_are_those_of_float64(config: KernelConfig, classes: int) -> None:
    logits, targets = batch(300 if classes < 1000 else 60, classes)
    result = metered(logits, targets, config)
    x, t = kept(logits, targets)
    p = x.softmax(-1)
    log_p = x.log_softmax(-1)
    one_hot = torch.nn.functional.one_hot(t, classes)
    predicted = x.argmax(-1)
    top = x.topk(2).values
    assert result.calibration is not None
    assert result.per_class is not None
    nll = -log_p.gather(-1, t[:, None]).mean().item()
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    brier = (p - one_hot).square().sum(-1).mean().item()
    assert result.calibration.brier == pytest.approx(brier, rel=1e-5)
    entropy = torch.special.entr(p).sum(-1).mean().item()
    assert result.entropy == pytest.approx(entropy, rel=1e-5)
    assert result.margin == pytest.approx((top[:, 0] - top[:, 1]).mean().item(), rel=1e-5)
    classes_of = [
        tuple(torch.bincount(of, minlength=classes).tolist())
        for of in (t, t[predicted == t], predicted)
    ]
    found = result.per_class
    assert [found.support, found.correct, found.predicted] == classes_of
    confidence = p.amax(-1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    for b in range(BINS):
        in_bin = bins == b
        assert result.calibration.rows[b] == in_bin.sum()
        assert result.calibration.correct[b] == (predicted == t)[in_bin].sum()
        of_bin = confidence[in_bin].sum().item()
        assert result.calibration.confidence[b] == pytest.approx(of_bin, rel=1e-6)


def test_measures_are_those_of_torchmetrics(config: KernelConfig) -> None:
    logits, targets = batch(500, 12)
    result = metered(logits, targets, config, confusion=True)
    x, t = kept(logits, targets)
    p = x.softmax(-1)
    assert result.per_class is not None
    assert result.calibration is not None
    averages = {"macro": result.per_class.macro(), "weighted": result.per_class.weighted()}
    for average, found in averages.items():
        for name in ("accuracy", "precision", "recall", "f1_score"):
            function = getattr(torchmetrics, f"multiclass_{name}")
            expected = function(p, t, num_classes=12, average=average).item()
            assert getattr(found, name.removesuffix("_score")) == pytest.approx(expected, rel=1e-5)
    for name, norm in (("ece", "l1"), ("mce", "max")):
        expected = torchmetrics.multiclass_calibration_error(
            p, t, 12, n_bins=BINS, norm=norm
        ).item()
        assert getattr(result.calibration, name) == pytest.approx(expected, rel=1e-5)
    matrix = torchmetrics.multiclass_confusion_matrix(p, t, 12)
    assert torch.equal(torch.tensor(result.confusion), matrix)


def test_measures_are_those_of_scikit_learn(config: KernelConfig) -> None:
    """One class is never a target, one is never predicted, and one is neither."""
    logits, targets = batch(200, 9)
    targets = torch.where(targets == 4, 5, targets)
    logits[:, 7] = -100.0
    logits[:, 8] = -200.0
    targets = torch.where(targets == 8, 0, targets)
    result = metered(logits, targets, config)
    x, t = kept(logits, targets)
    truth, predicted = t.numpy(), x.argmax(-1).numpy()
    assert result.per_class is not None
    averages = {"macro": result.per_class.macro(), "weighted": result.per_class.weighted()}
    for average, found in averages.items():
        expected = sklearn.metrics.precision_recall_fscore_support(
            truth, predicted, average=average, zero_division=0
        )
        assert (found.precision, found.recall, found.f1) == pytest.approx(expected[:3])
    expected = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(9), zero_division=0
    )
    of_classes = (result.per_class.precision, result.per_class.recall, result.per_class.f1)
    assert np.allclose(of_classes, expected[:3])


def test_the_mean_likelihood_is_that_of_scikit_learn(config: KernelConfig) -> None:
    logits, targets = batch(200, 9, odd=False)
    nll = sklearn.metrics.log_loss(targets, logits.double().softmax(-1), labels=range(9))
    result = metered(logits, targets, config, label_smoothing=0.1, z_loss=0.01)
    assert result.nll == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_in_place_measures_as_the_loss_does(
    config: KernelConfig, dtype: torch.dtype, classes: int
) -> None:
    logits, targets = batch(100, classes)
    logits = logits.to(dtype)
    meters = [Meter("cpu", per_class=classes, calibration_bins=5, entropy=True) for _ in range(2)]
    cross_entropy(logits, targets, softcap=5.0, meter=meters[0], config=config)
    cross_entropy_step(logits.clone(), targets, meters[1], softcap=5.0, inplace=True, config=config)
    assert torch.equal(meters[0].counts, meters[1].counts)
    assert torch.equal(meters[0].sums[3:], meters[1].sums[3:])  # the loss is NaN
    eager = Meter("cpu", per_class=classes, calibration_bins=5, entropy=True)
    cross_entropy(logits, targets, softcap=5.0, meter=eager, config=KernelConfig(backend="eager"))
    assert torch.equal(meters[0].counts, eager.counts)
    torch.testing.assert_close(meters[0].sums, eager.sums, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_three_rows_by_hand(config: KernelConfig) -> None:
    """Probabilities (3/4, 1/4), (1/2, 1/2), whose first class wins the tie, and (1/4, 3/4)."""
    ln3 = math.log(3)
    meter = Meter("cpu", per_class=2, calibration_bins=4, entropy=True, confusion=True)
    logits = torch.tensor([[ln3, 0.0], [0.0, 0.0], [0.0, ln3]])
    cross_entropy_step(logits, torch.tensor([0, 1, 0]), meter, config=config)
    result = meter.compute()
    assert result.confusion == ((1, 1), (1, 0))
    assert result.per_class is not None
    assert result.per_class.recall == (0.5, 0.0)
    assert result.per_class.precision == (0.5, 0.0)
    assert result.per_class.macro().f1 == 0.25
    assert result.per_class.weighted().accuracy == pytest.approx(1 / 3)
    calibration = result.calibration
    assert calibration is not None
    assert (calibration.rows, calibration.correct) == ((0, 0, 1, 2), (0, 0, 0, 1))
    assert calibration.confidence == pytest.approx((0, 0, 0.5, 1.5))
    nan = math.nan
    assert calibration.mean_confidence == pytest.approx((nan, nan, 0.5, 0.75), nan_ok=True)
    assert calibration.accuracy == pytest.approx((nan, nan, 0.0, 0.5), nan_ok=True)
    assert calibration.ece == pytest.approx((0.5 + 0.5) / 3)
    assert calibration.mce == pytest.approx(0.5)
    assert calibration.brier == pytest.approx((2 / 16 + 2 / 4 + 18 / 16) / 3)
    assert result.nll == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(4)) / 3)
    assert result.perplexity == pytest.approx((32 / 3) ** (1 / 3))
    uneven = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert result.entropy == pytest.approx((2 * uneven + math.log(2)) / 3)
    assert result.margin == pytest.approx(2 * ln3 / 3)


def test_what_is_not_measured_is_none_and_nothing_is_nan(config: KernelConfig) -> None:
    plain = Meter("cpu").compute()
    fields = ("per_class", "confusion", "calibration", "nll", "entropy", "margin")
    assert [getattr(plain, name) for name in fields] == [None] * 6
    meter = Meter("cpu", per_class=3, calibration_bins=2, entropy=True)
    ignored = torch.full((2,), -100)
    cross_entropy(torch.zeros(2, 3), ignored, meter=meter, config=config)
    cross_entropy(torch.zeros(0, 3), ignored[:0], meter=meter, config=config)
    result = meter.compute()
    assert result.per_class is not None
    assert result.calibration is not None
    means = (result.nll, result.perplexity, result.entropy, result.margin, result.calibration.ece)
    assert all(math.isnan(x) for x in means if x is not None)
    assert math.isnan(result.per_class.macro().f1)
    assert result.per_class.support == (0, 0, 0)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 4.0)])
def test_rows_too_long_to_keep(
    config: KernelConfig, dtype: torch.dtype, softcap: float | None
) -> None:
    """Triton reads them in pieces of 4,096 classes. They begin and end anywhere, the largest logits
    are tied across pieces or at an end, and the largest of all comes late."""
    classes = 9001
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, classes + 5, generator=generator) * 3).to(dtype)[:, 3:-2]
    logits[0, 4000::4000] = 30
    logits[1, -1] = 40
    logits[2, [0, -2]] = 20
    logits[3] = -torch.inf
    logits[3, 8999] = 2
    logits[4, ::2] = -torch.inf
    targets = torch.tensor([4000, 7, 0, 8999, 5, -100])
    meters = [Meter("cpu", per_class=classes, calibration_bins=7, entropy=True) for _ in range(2)]
    cross_entropy(logits, targets, softcap=softcap, meter=meters[0], config=config)
    eager = KernelConfig(backend="eager")
    cross_entropy(logits.double(), targets, softcap=softcap, meter=meters[1], config=eager)
    assert torch.equal(meters[0].counts, meters[1].counts)
    torch.testing.assert_close(meters[0].sums[3:], meters[1].sums[3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 5, 31, 32, 33, 5000])
def test_one_class_and_masked_classes(config: KernelConfig, classes: int) -> None:
    """If all other logits are -inf, the prediction is certain, and its margin is infinite."""
    logits = torch.full((3, classes), -torch.inf)
    logits[:, classes // 2] = -2000.0
    meter = Meter("cpu", per_class=classes, calibration_bins=3, entropy=True)
    cross_entropy(logits, torch.full((3,), classes // 2), meter=meter, config=config)
    result = meter.compute()
    assert (result.nll, result.entropy, result.margin) == (0, 0, math.inf)
    assert result.calibration is not None
    assert (result.calibration.rows, result.calibration.brier) == ((0, 0, 3), 0)
    assert result.per_class is not None
    assert result.per_class.correct[classes // 2] == 3


def test_mixup_counts_the_target_with_the_larger_share(config: KernelConfig) -> None:
    logits, targets = batch(60, 7, odd=False)
    plain = Meter("cpu", per_class=7, calibration_bins=4, entropy=True, confusion=True)
    mixed = plain.empty_copy()
    cross_entropy(logits, targets, meter=plain, config=config)
    other = targets.roll(1)
    cross_entropy(logits, other, targets2=targets, share=0.3, meter=mixed, config=config)
    assert torch.equal(plain.counts, mixed.counts)
    torch.testing.assert_close(plain.sums[3:], mixed.sums[3:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_ops_fill_the_same_measures(config: KernelConfig, reduction: str) -> None:
    """`record_loss`, the linear form in chunks, and classes that are not last."""
    logits, targets = batch(90, 6)
    logits = logits.nan_to_num(nan=0.0, posinf=5.0, neginf=-5.0)
    first = Meter("cpu", per_class=6, calibration_bins=4, entropy=True)
    others = [first.empty_copy() for _ in range(3)]
    cross_entropy(logits, targets, meter=first, reduction=reduction, config=config)
    record_loss(torch.tensor(0.5), logits, targets, others[0])
    identity = torch.eye(6)
    linear_cross_entropy_step(logits, identity, targets, others[1], config=config)
    dense = logits.view(9, 10, 6).movedim(-1, 1).contiguous()
    cross_entropy(dense, targets.view(9, 10), class_dim=1, meter=others[2], config=config)
    for other in others:
        assert torch.equal(first.counts[6:], other.counts[6:])
        torch.testing.assert_close(first.sums[3:], other.sums[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "classes"), [(700, 10), (700, 1000), (30_000, 3), (20_000, 40)])
@pytest.mark.parametrize("confusion", [False, True])
def test_bits_do_not_depend_on_threads(rows: int, classes: int, confusion: bool) -> None:
    """Few rows and many, which threads add up in chunks."""
    logits, targets = batch(rows, classes)
    found = []
    plan = {"per_class": classes, "calibration_bins": 15, "entropy": True, "confusion": confusion}
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            for backend in ("eager", "cpp"):
                meter = Meter("cpu", **plan)
                config = KernelConfig(backend=backend)
                cross_entropy_step(logits, targets, meter, config=config)
                found.append((meter.sums.view(torch.int64).tolist(), meter.counts.tolist()))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]
    places = 7 + (classes if confusion else 3) * classes  # bins may differ by a rounding
    assert found[0][1][:places] == found[1][1][:places]
    assert sum(found[0][1][places : places + 15]) == sum(found[1][1][places : places + 15])


def test_state_survives_and_another_plan_is_refused() -> None:
    meter = Meter("cpu", per_class=4, calibration_bins=3)
    cross_entropy(torch.eye(4), torch.arange(4), meter=meter)
    file = io.BytesIO()
    torch.save(meter.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    loaded = meter.empty_copy()
    loaded.load_state_dict(state)
    assert loaded.compute() == meter.compute()
    loaded.reset()
    assert not loaded.counts.any()
    with pytest.raises(ValueError, match=r"same measures .*: \[\], got \[4, 3, 0, 0\]"):
        Meter("cpu").load_state_dict(state)
    old = Meter("cpu").state_dict()
    del old["measures"]
    Meter("cpu").load_state_dict(old)


def test_wrong_arguments_are_refused_by_name(config: KernelConfig) -> None:
    for name, wrong in (("per_class", True), ("calibration_bins", 2.0), ("per_class", None)):
        with pytest.raises(TypeError, match=f"{name} must be an int, 0 for off"):
            Meter("cpu", **{name: wrong})
    with pytest.raises(TypeError, match="entropy must be True or False, got 1"):
        Meter("cpu", entropy=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_class must be 0"):
        Meter("cpu", per_class=-1)
    for classes in (0, 1025):
        with pytest.raises(ValueError, match=r"confusion=True needs per_class.*\[1, 1024\]"):
            Meter("cpu", per_class=classes, confusion=True)
    meter = Meter("cpu", per_class=4)
    with pytest.raises(ValueError, match=r"expected logits of 4 classes .*got 5; make the Meter"):
        cross_entropy(torch.zeros(2, 5), torch.tensor([0, 1]), meter=meter, config=config)
    assert not meter.counts.any()
    with pytest.raises(ValueError, match=r"expected logits of 4 classes .*got 6; make the Meter"):
        vocab_parallel_cross_entropy(
            torch.zeros(2, 4), torch.tensor([0, 1]), ClassShard(0, 6), meter=meter
        )


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_measures_in_a_compiled_graph(backend: str) -> None:
    logits, targets = batch(50, 10)
    config = KernelConfig(backend=backend)
    eager = Meter("cpu", per_class=10, calibration_bins=5, entropy=True)
    compiled = eager.empty_copy()

    def step(meter: Meter) -> Tensor:
        return cross_entropy_step(logits, targets, meter, config=config)

    step(eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(eager.counts, compiled.counts)
    torch.testing.assert_close(eager.sums, compiled.sums, rtol=1e-6, atol=0, equal_nan=True)
