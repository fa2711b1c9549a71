"""`report.html` of a run directory: its events in words, tables and pictures, one page that opens offline.

`cli` calls `write_report`. The page tells only what the run wrote: its `metrics.jsonl`, that of the baseline,
and the thresholds in `config.json`. `_tag` and matplotlib escape whatever text comes from there.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from html import escape
from itertools import cycle, groupby
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from esper_train.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage
from esper_train.run_directory import BASELINE, CONFIG, METRICS, REPORT, load_config, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Curve = tuple[Sequence[float], Mapping[str, Any]]
"""Values of the epochs 1, 2, ..., and how `Axes.plot` is to draw them."""
Panel = Callable[["Axes"], None]

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
STAGES = ("#e8e8e8", "#f0e442", "#56b4e9", "#e69f00", "#cc79a7", "#2e9e5b", "#d55e00", "#9a9a9a")
STAGE_COLORS: Mapping[str, str] = dict(zip(SeedStage.__members__, STAGES, strict=True))  # DORMANT is first
STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "esper",  # without it the ids are random
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{title}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: auto; padding: 1rem }}
h1, p {{ overflow-wrap: anywhere }}
svg {{ display: block; width: 100%; max-width: 100%; height: auto; background: #fff }}
div {{ overflow-x: auto; margin: .5rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #8888 }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


class _Run(NamedTuple):
    """The events of one run, by kind; `finished` is empty where the run reported no end."""

    started: Record
    epochs: list[Record]
    moves: list[Record]
    nonfinite: list[Record]
    finished: Record

    @property
    def status(self) -> str:
        return str(self.finished.get("status", "still running or killed"))

    @property
    def fossilized(self) -> list[Record]:
        return [move for move in self.moves if move["stage"] == "FOSSILIZED"]

    def series(self, *path: str | int) -> list[float]:
        """A number of each epoch, NaN where there is none."""
        return [_number(epoch, *path) for epoch in self.epochs]


def write_report(directory: Path) -> Path:
    """Write `report.html` into a run directory and return its path. The same events give the same bytes.

    Accuracies are in percent, contributions in percentage points, losses in nats. A run without events or cut
    short gets a page that says so; of several runs in one file the last is shown.

    Raises:
        FileNotFoundError: there is no such directory.
        ImportError: there is something to draw, and no matplotlib.
        ValueError: a line of `metrics.jsonl` before the last is not JSON.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give that of a run")
    run, baseline = _read(directory), _read(directory / BASELINE)
    if run is None:
        title, parts = "Nothing to report", [_tag("p", f"{METRICS} is missing or holds no run.")]
    else:
        title = f"{run.started['task']}, {run.started['mode']}, seed {run.started['seed']}: {run.status}"
        parts = [*_words(run, baseline), *_summary(run, baseline)]
        if len(run.epochs) > 1:
            parts += [*_curves(run, baseline), *_stages(run), *_gradients(run)]
        else:
            only = "Only one epoch" if run.epochs else "No epoch"
            parts.append(_tag("p", f"{only} was finished: there is no course over epochs to draw."))
        parts += _seeds(run, _growth(directory))
    path = directory / REPORT
    page = PAGE.format(title=_tag("title", title), body="\n".join([_tag("h1", title), *parts]))
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _read(directory: Path) -> _Run | None:
    """The last run in a directory's metrics; None where there is none."""
    events = read_metrics(directory) if (directory / METRICS).is_file() else []
    starts = [place for place, event in enumerate(events) if event["event"] == "run_started"]
    if not starts:
        return None
    kinds: dict[str, list[Record]] = defaultdict(list)
    for event in events[starts[-1] :]:
        kinds[event["event"]].append(event)
    start, *ends = kinds["run_started"] + kinds["run_finished"]
    return _Run(start, kinds["epoch"], kinds["seed_stage"], kinds["nonfinite"], ends[0] if ends else {})


def _growth(directory: Path) -> GrowthConfig | None:
    """The thresholds of the run; None where its config is missing or of another version."""
    try:
        return load_config(directory).growth
    except (OSError, ValueError, TypeError):
        return None


def _words(run: _Run, baseline: _Run | None) -> list[str]:
    start, test, other = run.started, _test(run), _test(baseline)
    asked = (run.epochs or [start])[-1]["max_epochs"]  # a resumed run may have more than it started with
    where = f"{len(run.epochs)} of {asked} epochs on {start['device']} ({start['backend']})"
    lines = [f"Status: {run.status}, {where}."]
    if run.status == "nonfinite":
        lines.append("The loss became NaN or infinite, which ended the run.")
    for event in run.nonfinite:
        counts = f"{event['logits']} rows of logits and {event['gradients']} gradient entries"
        lines.append(f"In epoch {event['epoch']}, {counts} were NaN or infinite.")
    parts = ["Test accuracy was not measured" if math.isnan(test) else f"Test accuracy {test:.2f}%"]
    if not math.isnan(other):
        parts[0] += f" (fit baseline: {other:.2f}%)"
    if run.finished:
        parts.append(f"{run.finished['parameters']:,} parameters (host: {start['host_parameters']:,})")
    if start["slots"]:
        kept = ", ".join(f"{m['seed_id']} {_show(m['contribution'], '+.2f')} points" for m in run.fossilized)
        parts.append(f"seeds fossilized: {len(run.fossilized)}" + (f" ({kept})" if kept else ""))
    return [_tag("p", " ".join(lines)), _tag("p", "; ".join(parts) + ".")]


def _summary(run: _Run, baseline: _Run | None) -> list[str]:
    def column(name: str, r: _Run) -> dict[str, str]:
        accuracy, loss = r.series("validation", "accuracy"), r.series("validation", "loss")
        return {
            "": name,
            "status": r.status,
            "test accuracy": _show(_test(r), ".2f", "%"),
            "best validation accuracy": _show(max(_finite(accuracy), default=None), ".2f", "%"),
            "last validation accuracy": _show(accuracy[-1] if accuracy else None, ".2f", "%"),
            "last validation loss": _show(loss[-1], ".4f", none="not finite") if loss else "not measured",
            "parameters": _show(r.finished.get("parameters"), ","),
            "seconds": _show(r.finished.get("seconds"), ".1f"),
        }

    columns = [column("run", run)] + ([column("baseline", baseline)] if baseline else [])
    note = "The baseline (fit) is the same host, trained without slots." if baseline else "There is no baseline run."
    return [_table([name, *(c[name] for c in columns)] for name in columns[0]), _tag("p", note)]


def _curves(run: _Run, baseline: _Run | None) -> list[str]:
    notes, panels = [], []
    for key, unit in (("loss", "loss (nats)"), ("accuracy", "accuracy (%)")):
        train, validation = run.series("train", key), run.series("validation", key)
        curves = [_curve("training", train, COLORS[0]), _curve("validation", validation, COLORS[1])]
        if baseline:
            other = baseline.series("validation", key)
            curves.append(_curve("baseline's validation", other, "#777777", ls="--"))
        pairs = enumerate(zip(train, validation, strict=True), start=1)
        gaps = ", ".join(str(epoch) for epoch, pair in pairs if len(_finite(pair)) < 2)
        if gaps:
            notes.append(_tag("p", f"No finite {key} to draw in epoch {gaps}."))
        panels += _panel(unit, curves, log=key == "loss", moves=run.moves)
    picture = _picture("curves", "Loss and accuracy over epochs", panels)
    return [_tag("h2", "Loss and accuracy"), *picture, *notes]


def _stages(run: _Run) -> list[str]:
    heading, slots = _tag("h2", "Slots"), run.started["slots"]
    if not run.moves:
        why = "No seed was germinated." if slots else "This run had no slots to grow in."
        return [heading, _tag("p", why)]

    def draw(axes: "Axes") -> None:
        seen: dict[str, Any] = {}
        for place in range(len(slots)):
            stages = [epoch["slots"][place]["stage"] for epoch in run.epochs]
            for stage, span in groupby(range(len(stages)), key=stages.__getitem__):
                first, *more = span
                seen[stage] = axes.barh(place, 1 + len(more), 0.8, first + 0.5, color=STAGE_COLORS[stage])
            alpha = run.series("slots", place, "alpha")
            height = [place + 0.4 - 0.8 * a if a > 0 else math.nan for a in alpha]
            (seen["alpha"],) = axes.plot(range(1, 1 + len(alpha)), height, color="#000000")
        axes.set_yticks(range(len(slots)), slots)
        axes.set_ylim(len(slots) - 0.5, -0.5)
        names = [name for name in (*STAGE_COLORS, "alpha") if name in seen]
        _legend(axes, [seen[name] for name in names], names)

    picture = _picture("stages", "Stage of each slot over epochs", [draw], 1 + 0.4 * len(slots))
    note = "The line in a band is alpha, the seed's share of the slot's output, from 0 (bottom) to 1 (top)."
    return [heading, *picture, _tag("p", note)]


def _gradients(run: _Run) -> list[str]:
    heading, slots = _tag("h2", "Gradients"), run.started["slots"]

    def norms(name: str) -> list[float]:
        pairs = zip(*(run.series("grad", "groups", name, key) for key in ("gradient_norm", "tensors")), strict=True)
        return [norm if tensors > 0 else math.nan for norm, tensors in pairs]  # over no tensor it is 0

    curves = [_curve("total", run.series("grad", "gradient_norm"), "#cccccc", lw=4)]
    curves += [_curve(name, norms(name), color) for name, color in zip(("host", *slots), cycle(COLORS))]
    health = _curve("all gradients", run.series("grad", "gradient_health"), "#000000")
    panels = _panel("gradient norm", curves, log=True) + _panel("health", [health], limits=(-0.05, 1.05))
    if not panels:
        return [heading, _tag("p", "Gradients were not measured.")]
    note = "A gap is an epoch without a measurement; a line that falls out of a log scale is at 0."
    styles = [style for _, style in curves[2:]]  # of the slots
    ratios = [(run.series("slots", i, "gradient_ratio"), style) for i, style in enumerate(styles)]
    ratio = _panel("seed / host gradient", ratios, log=True)
    if not ratio:
        note += " No seed's gradient was measured against the host's."
    picture = _picture("gradients", "Gradient norms, health and ratios over epochs", panels + ratio)
    return [heading, *picture, _tag("p", note)]


def _seeds(run: _Run, growth: GrowthConfig | None) -> list[str]:
    heading, fossils = _tag("h2", "Seeds"), run.fossilized
    if not run.moves:
        return [heading, _tag("p", "There was no seed in this run.")]

    def draw(axes: "Axes") -> None:
        values = [_number(move, "contribution") for move in fossils]
        names = [f"{move['seed_id']}, {move['slot']}\n{move['blueprint']}" for move in fossils]
        bars = axes.barh(names, values, 0.5, color=STAGE_COLORS["FOSSILIZED"])
        axes.bar_label(bars, [_show(value, "+.2f") for value in values], padding=3)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.margins(x=0.25)  # room for the numbers
        axes.set_xlabel("contribution (percentage points)")
        if growth:
            line = axes.axvline(growth.fossilize_contribution, color="#000000", ls="--")
            _legend(axes, [line], [f"least to be fossilized: {growth.fossilize_contribution:g}"])

    title, height = "Contribution of each seed when it was fossilized", 1 + 0.45 * len(fossils)
    parts = _picture("contributions", title, [draw], height, epochs=False) if fossils else []
    note = "Moves are made at the end of their epoch; contributions are points of validation accuracy."
    if not fossils:
        note = f"No seed was fossilized. {note}"
    elif growth is None:
        note += f" The least contribution that was asked is not known: {CONFIG} is missing or does not fit."
    columns = ["seed", "slot", "blueprint", "germinated", "end", "epoch", "contribution", "parameters", "reason"]
    return [heading, *parts, _table([columns, *_lives(run)]), _tag("p", note)]


def _lives(run: _Run) -> Iterator[list[str]]:
    """A row a seed: germination and end or, while that is open, the last move and newest contribution."""
    for seed in dict.fromkeys(move["seed_id"] for move in run.moves if move["seed_id"] is not None):
        moves = [move for move in run.moves if move["seed_id"] == seed]
        end = next((move for move in moves if move["stage"] in ("FOSSILIZED", "CULLED")), None)
        last = newest = end or moves[-1]
        if end is None and run.epochs:
            newest = next((slot for slot in run.epochs[-1]["slots"] if slot["seed_id"] == seed), last)
        row = [seed, last["slot"], last["blueprint"], moves[0]["epoch"]]
        row += [last["stage"] if end else f"open ({last['stage']})", last["epoch"]]
        row += [_show(newest["contribution"], "+.2f"), f"{last['seed_parameters']:,}", last["reason"]]
        yield [str(cell) for cell in row]


def _curve(label: str, values: list[float], color: str, **style: Any) -> Curve:
    # the markers show a value between two gaps
    return values, {"label": label, "color": color, "lw": 1.2, "marker": ".", "ms": 3} | style


def _panel(
    name: str,
    curves: Sequence[Curve],
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    moves: Sequence[Record] = (),
) -> list[Panel]:
    """One panel of curves over the epochs, marked where a seed was kept or culled; none without a number."""
    drawn = [curve for curve in curves if _finite(curve[0])]
    positive = [value for values, _ in drawn for value in _finite(values) if value > 0]

    def draw(axes: "Axes") -> None:
        for values, style in drawn:
            axes.plot(range(1, 1 + len(values)), values, **style)
        # over less than two decades a log scale may have no tick to label
        if log and positive and max(positive) > 100 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the default writes mathematical text
            axes.yaxis.set_minor_formatter("")
        if limits:
            axes.set_ylim(*limits)
        for stage, ls in (("FOSSILIZED", "-"), ("CULLED", "--")):
            at = [move["epoch"] + 0.5 for move in moves if move["stage"] == stage]
            if at:
                heights, color = axes.get_xaxis_transform(), STAGE_COLORS[stage]
                axes.vlines(at, 0, 1, transform=heights, color=color, lw=1, ls=ls, label=stage.lower())
        axes.set_ylabel(name)
        _legend(axes, *axes.get_legend_handles_labels())

    return [draw] if drawn else []


def _legend(axes: "Axes", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the panel, where it covers nothing."""
    axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def _picture(
    name: str, title: str, panels: Sequence[Panel], height: float | None = None, *, epochs: bool = True
) -> list[str]:
    """The panels one below the other as inline SVG, or nothing. `name` is unique on the page."""
    if not panels:
        return []
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's pictures need matplotlib: install esper-kernels[train]") from error
    with style.context(["default", dict(STYLE)]):
        figure = Figure(figsize=(5.0, height or 0.5 + 1.8 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, draw in zip(rows, panels, strict=True):
            draw(axes)
        if epochs:
            axes.set(xlabel="epoch", xlim=(0.5, None))
            axes.xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = f'<svg role="img" aria-label="{escape(title)}"' + svg[svg.index("<svg") + 4 :]
    # ids start over in every picture, but must differ on one page
    return [re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)]


def _test(run: _Run | None) -> float:
    """Test accuracy in percent, NaN where it was not measured."""
    return _number(run and run.finished, "test", "accuracy")


def _number(record: Any, *path: str | int) -> float:
    """The number at the end of the path; NaN for a null, and where the path breaks off."""
    with suppress(LookupError, TypeError):
        return float(reduce(getitem, path, record))
    return math.nan


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _show(value: float | None, form: str, unit: str = "", *, none: str = "not measured") -> str:
    return none if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _table(rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells, the first one the header."""
    lines = ["".join(_tag("td" if i else "th", cell) for cell in row) for i, row in enumerate(rows)]
    return "<div><table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"
