"""The part of a report about `train.measures`: a table, and pictures of the last epoch that has
them: reliability diagram, rows by class, confusion matrix."""

import math
from collections.abc import Mapping, Sequence

from esper_train.run.report.draw import GREY, Axes, draw_picture, legend
from esper_train.run.report.history import History, Record, number_at
from esper_train.run.report.page import show, table, tag

MOST_LABELS = 20
"""Classes up to which each has its number on an axis, and each cell of the matrix its count."""
_NUMBERS = (
    ("negative log-likelihood", ("nll",), ".4f", " nats"),
    ("expected calibration error", ("calibration", "ece"), ".4f", ""),
    ("largest calibration error", ("calibration", "mce"), ".4f", ""),
    ("Brier score", ("calibration", "brier"), ".4f", ""),
    ("entropy", ("entropy",), ".4f", " nats"),
    ("margin of the largest logit", ("margin",), ".4g", ""),
    ("macro precision", ("per_class", "macro", "precision"), ".4f", ""),
    ("macro recall", ("per_class", "macro", "recall"), ".4f", ""),
    ("macro F1", ("per_class", "macro", "f1"), ".4f", ""),
    ("weighted F1", ("per_class", "weighted", "f1"), ".4f", ""),
)
"""Name, path, format and unit of each row of the table."""


def measures_part(run: History) -> list[str]:
    """Nothing for a run without measures."""
    found = [(i, e) for i, e in enumerate(run.epochs, 1) if _measures(e, "validation")]
    if not found:
        return []
    number, epoch = found[-1]
    both = {name: _measures(epoch, name) for name in ("train", "validation")}
    measures = both["validation"]
    parts = [tag("h2", "Measures"), tag("p", f"Of epoch {number}; the pictures are of validation.")]
    parts.append(_table(both))
    if calibration := measures.get("calibration"):
        parts += _reliability(calibration)
    if classes := measures.get("per_class"):
        parts += _bars(classes)
    if confusion := measures.get("confusion"):
        parts += _matrix(confusion)
    return parts


def _measures(epoch: Record, name: str) -> Record:
    found: Record = (epoch.get(name) or {}).get("measures") or {}
    return found


def _table(both: Mapping[str, Record]) -> str:
    rows = [["", *both]]
    for name, path, form, unit in _NUMBERS:
        values = [number_at(measures, *path) for measures in both.values()]
        if not all(map(math.isnan, values)):
            rows.append([name, *(show(value, form, unit) for value in values)])
    return table(rows)


def _reliability(calibration: Record) -> list[str]:
    rows, correct, confidence = (calibration[key] for key in ("rows", "correct", "confidence"))
    bins = len(rows)
    full = [i for i in range(bins) if rows[i]]
    confidences = [confidence[i] / rows[i] for i in full]
    accuracies = [correct[i] / rows[i] for i in full]

    def draw(axes: Axes) -> None:
        axes.bar([(i + 0.5) / bins for i in full], accuracies, 0.9 / bins, label="accuracy")
        axes.plot(confidences, accuracies, "o", color="black", ms=3, label="mean confidence")
        axes.plot([0, 1], [0, 1], color=GREY, ls="--", label="perfectly calibrated")
        axes.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="confidence", ylabel="accuracy")
        legend(axes)

    def draw_rows(axes: Axes) -> None:
        axes.bar([(i + 0.5) / bins for i in range(bins)], rows, 0.9 / bins)
        axes.set(xlim=(0, 1), xlabel="confidence", ylabel="rows")

    note = (
        "A bar is the accuracy of the rows whose largest probability is in its bin; the point on "
        "its top is at their mean confidence. Points below the dashed line are overconfident."
    )
    title = "Reliability: accuracy over confidence"
    picture = draw_picture("reliability", title, [draw, draw_rows], 4.5, over_epochs=False)
    return [tag("h3", "Calibration"), *picture, tag("p", note)]


def _bars(classes: Record) -> list[str]:
    support, correct, predicted = (classes[key] for key in ("support", "correct", "predicted"))
    numbers = range(len(support))
    recall = [c / s if s else 0.0 for c, s in zip(correct, support, strict=True)]
    precision = [c / p if p else 0.0 for c, p in zip(correct, predicted, strict=True)]

    def shares(axes: Axes) -> None:
        _pairs(axes, {"recall": recall, "precision": precision})
        axes.set(ylim=(0, 1.05), ylabel="share")

    def rows(axes: Axes) -> None:
        _pairs(axes, {"targets": support, "predictions": predicted})
        axes.set(xlabel="class", ylabel="rows")

    def _pairs(axes: Axes, pairs: Mapping[str, Sequence[float]]) -> None:
        for side, (name, values) in zip((-0.2, 0.2), pairs.items(), strict=True):
            axes.bar([i + side for i in numbers], values, 0.4, label=name)
        axes.set_xlim(-0.6, len(numbers) - 0.4)
        if len(numbers) <= MOST_LABELS:
            axes.set_xticks(numbers)
        legend(axes)

    title = "Recall, precision, targets and predictions of each class"
    picture = draw_picture("classes", title, [shares, rows], over_epochs=False)
    return [tag("h3", "Classes"), *picture]


def _matrix(confusion: Sequence[Sequence[int]]) -> list[str]:
    shares = [[n / (sum(row) or 1) for n in row] for row in confusion]
    numbers = range(len(confusion))

    def draw(axes: Axes) -> None:
        # one image, and not a shape per cell: there may be a million of them
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label="share of the target's rows")
        axes.set(xlabel="prediction", ylabel="target")
        if len(numbers) > MOST_LABELS:
            return
        axes.set_xticks(numbers)
        axes.set_yticks(numbers)
        for target, row in enumerate(confusion):
            for prediction, n in enumerate(row):
                color = "white" if shares[target][prediction] > 0.5 else "black"
                where = {"ha": "center", "va": "center", "fontsize": 6, "color": color}
                axes.text(prediction, target, str(n), **where)

    title = "Confusion matrix: targets and what was predicted for them"
    picture = draw_picture("confusion", title, [draw], 4.2, over_epochs=False)
    return [tag("h3", "Confusion matrix"), *picture]
