"""Measures that a `Meter` can take besides loss and correct predictions, and their results.

A row is measured if it is valid and finite, as for correct@k: ignored rows, bad targets and rows
with NaN or infinite logits enter nothing here. p are the probabilities softmax(x) of a row's
logits x after softcap; loss options (class weights, label smoothing, z-loss) do not enter. With
MixUp the target is the one that counts, as for correct@k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_CONFUSION_CLASSES = 1024
# The layout that every backend writes, after SUMS and the bases of COUNTS of `meter`: sums over
# measured rows, then for each calibration bin the sum of its confidences.
ROW_SUMS = ("nll", "brier", "entropy", "margin")
CLASS_COUNTS = ("support", "correct", "predicted")  # of each class; or the confusion matrix
BIN_COUNTS = ("rows", "correct")  # of each calibration bin


class MeasurePlan(NamedTuple):
    """The measures that a meter takes: its arguments, as integers that can be passed to ops."""

    per_class: int  # the number of classes, or 0
    calibration_bins: int  # or 0
    entropy: int  # 0 or 1
    confusion: int  # 0 or 1

    @property
    def num_sums(self) -> int:
        return len(ROW_SUMS) + self.calibration_bins

    @property
    def num_class_counts(self) -> int:
        rows = self.per_class if self.confusion else len(CLASS_COUNTS)
        return rows * self.per_class

    @property
    def num_counts(self) -> int:
        return self.num_class_counts + len(BIN_COUNTS) * self.calibration_bins


def plan_measures(
    per_class: int, calibration_bins: int, entropy: bool, confusion: bool
) -> MeasurePlan | None:
    """The plan of a meter with these arguments; None if it measures nothing besides. TypeError or
    ValueError, naming the argument."""
    for name, number in (("per_class", per_class), ("calibration_bins", calibration_bins)):
        if type(number) is not int:
            raise TypeError(f"{name} must be an int, 0 for off, got {number!r}")
        if not 0 <= number < 2**31:
            raise ValueError(f"{name} must be 0 (off) or a positive int, got {number}")
    for name, flag in (("entropy", entropy), ("confusion", confusion)):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if confusion and not 0 < per_class <= MOST_CONFUSION_CLASSES:
        raise ValueError(
            "confusion=True needs per_class, the number of classes, in [1, "
            f"{MOST_CONFUSION_CLASSES}], got per_class={per_class}"
        )
    if not (per_class or calibration_bins or entropy):
        return None
    return MeasurePlan(per_class, calibration_bins, int(entropy), int(confusion))


class Averages(NamedTuple):
    """Means over classes, fractions from 0 to 1.

    recall, precision and f1: of the classes' own. accuracy: of their own accuracies, which are
    their recalls.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class ClassMeasures:
    """Rows by class, V numbers each.

    support: measured rows with this target. correct: those of them that were predicted, that is
    whose first largest logit is the target's. predicted: measured rows predicted as this class.
    """

    support: tuple[int, ...]
    correct: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def recall(self) -> tuple[float, ...]:
        """correct / support of each class, its accuracy; 0 where there is no row."""
        return tuple(map(_fraction, self.correct, self.support))

    @property
    def precision(self) -> tuple[float, ...]:
        """correct / predicted of each class; 0 where there is no row."""
        return tuple(map(_fraction, self.correct, self.predicted))

    @property
    def f1(self) -> tuple[float, ...]:
        """2 correct / (support + predicted) of each class, the harmonic mean of precision and
        recall; 0 where there is no row."""
        both = (s + p for s, p in zip(self.support, self.predicted, strict=True))
        return tuple(map(_fraction, (2 * c for c in self.correct), both))

    def macro(self) -> Averages:
        """Means over the classes that are a target or a prediction of some row, as scikit-learn
        and torchmetrics take them; NaN if there is none."""
        pairs = zip(self.support, self.predicted, strict=True)
        return self._averages([float(s + p > 0) for s, p in pairs])

    def weighted(self) -> Averages:
        """Means over the classes, weighted by support; NaN without a row."""
        return self._averages([float(s) for s in self.support])

    def _averages(self, weights: Sequence[float]) -> Averages:
        total = math.fsum(weights)

        def mean(values: Sequence[float]) -> float:
            return ratio(math.fsum(w * x for w, x in zip(weights, values, strict=True)), total)

        recall = mean(self.recall)
        return Averages(recall, mean(self.precision), recall, mean(self.f1))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The agreement between confidences, the largest probability of each row, and accuracies.

    rows, correct: measured and correctly predicted rows whose confidence is in each of the M bins
    [m / M, (m + 1) / M); the last bin holds 1 too. confidence: the sum of their confidences.
    brier: mean of sum_c (p_c - [c = target])^2, in [0, 2] (Brier 1950).
    """

    rows: tuple[int, ...]
    correct: tuple[int, ...]
    confidence: tuple[float, ...]
    brier: float

    @property
    def mean_confidence(self) -> tuple[float, ...]:
        """The mean of each bin; NaN for an empty bin."""
        return tuple(map(ratio, self.confidence, self.rows))

    @property
    def accuracy(self) -> tuple[float, ...]:
        """The mean of each bin; NaN for an empty bin."""
        return tuple(map(ratio, self.correct, self.rows))

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over rows of their bin's |accuracy - mean
        confidence| (Guo et al. 2017, https://arxiv.org/abs/1706.04599); NaN without a row."""
        return ratio(math.fsum(self._gaps()), sum(self.rows))

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest |accuracy - mean confidence| of a bin with rows;
        NaN without a row."""
        gaps = [gap / n for gap, n in zip(self._gaps(), self.rows, strict=True) if n]
        return max(gaps, default=math.nan)

    def _gaps(self) -> list[float]:
        """The gap of each bin between confidence and accuracy, times the number of its rows."""
        return [abs(c - f) for c, f in zip(self.correct, self.confidence, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measures of a `MeterResult`; None where the meter does not take them.

    per_class, confusion: rows by class; `confusion[target][prediction]` (Meter(per_class=...,
        confusion=True)).
    calibration: (calibration_bins=...).
    nll: mean of -log p_target, in nats (with calibration_bins or entropy).
    entropy: mean of -sum_c p_c log p_c, in nats. margin: mean of the largest minus the second
        largest of x; infinite where every other logit is -inf, or for one class. (entropy=True)
    """

    per_class: ClassMeasures | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    calibration: Calibration | None = None
    nll: float | None = None
    entropy: float | None = None
    margin: float | None = None

    @property
    def perplexity(self) -> float | None:
        """e^nll; infinite where that exceeds a float."""
        return None if self.nll is None else exponential(self.nll)


def measured_of(
    plan: MeasurePlan | None, sums: Sequence[float], counts: Sequence[int], rows: int
) -> Measured:
    """The results in the accumulators, whose layout is described above. rows: the number of
    measured rows."""
    if plan is None:
        return Measured()
    means = {name: ratio(x, rows) for name, x in zip(ROW_SUMS, sums, strict=False)}
    of_classes = counts[: plan.num_class_counts]
    by_class = _in_rows(of_classes, plan.per_class)
    confusion = by_class if plan.confusion else None
    of_bins = counts[plan.num_class_counts :]
    bins = plan.calibration_bins
    return Measured(
        per_class=_class_measures(by_class, bool(plan.confusion)) if by_class else None,
        confusion=confusion,
        calibration=Calibration(
            rows=tuple(of_bins[:bins]),
            correct=tuple(of_bins[bins:]),
            confidence=tuple(sums[len(ROW_SUMS) :]),
            brier=means["brier"],
        )
        if bins
        else None,
        nll=means["nll"] if bins or plan.entropy else None,
        entropy=means["entropy"] if plan.entropy else None,
        margin=means["margin"] if plan.entropy else None,
    )


def _in_rows(counts: Sequence[int], width: int) -> tuple[tuple[int, ...], ...]:
    starts = range(0, len(counts), width or 1)
    return tuple(tuple(counts[start : start + width]) for start in starts)


def _class_measures(by_class: tuple[tuple[int, ...], ...], confusion: bool) -> ClassMeasures:
    """by_class: CLASS_COUNTS, or the confusion matrix."""
    if not confusion:
        support, correct, predicted = by_class
        return ClassMeasures(support=support, correct=correct, predicted=predicted)
    return ClassMeasures(
        support=tuple(map(sum, by_class)),
        correct=tuple(row[c] for c, row in enumerate(by_class)),
        predicted=tuple(map(sum, zip(*by_class, strict=True))),
    )


def ratio(numerator: float, denominator: float) -> float:
    """NaN for nothing by nothing."""
    return numerator / denominator if denominator else math.nan


def _fraction(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0


def exponential(x: float) -> float:
    """e^x; infinite where that exceeds a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
