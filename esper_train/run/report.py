"""`report.html`: the events of a run in words, tables and pictures, on one page that opens offline.

`cli` calls `write_report`, and `write_comparison` for several runs. A page shows only what the runs
wrote: `metrics.jsonl`, the baseline's, and the thresholds in `config.json`. `_tag` and matplotlib
escape the text.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage
from esper_train.run.directory import (
    BASELINE,
    METRICS,
    REPORT,
    load_config,
    read_metrics,
    write_file,
)

Record = Mapping[str, Any]
Curve = tuple[str, Sequence[float], Mapping[str, Any]]
"""Name, values for epochs 1, 2, ..., and keyword arguments for `Axes.plot`."""
Axes = Any  # matplotlib's; it is imported only when something is drawn
Panel = Callable[[Axes], None]

GREY = "#777777"
WIDE: Mapping[str, Any] = {"color": "#cccccc", "lw": 4}
"""Style of a total, which is drawn behind its parts."""
STAGES = ("#e8e8e8", "#f0e442", "#56b4e9", "#e69f00", "#cc79a7", "#2e9e5b", "#d55e00", "#9a9a9a")
# DORMANT is first
STAGE_COLORS: Mapping[str, str] = dict(zip(SeedStage.__members__, STAGES, strict=True))
STYLE: Mapping[str, Any] = {
    "axes.prop_cycle": "cycler(color=['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#d55e00', "
    "'#56b4e9', '#999999'])",
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
div > svg {{ min-width: 40rem }}
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
    """The events of one run, by kind. `finished` is empty if the run did not report its end."""

    started: Record
    epochs: list[Record]  # for epochs 1, 2, ...; empty where none was reported
    moves: list[Record]  # changes of stage, without those that a rollback undid
    troubles: list[Record]  # events with a message: what went wrong, or was done about it
    layers: list[Record]
    costs: list[Record]  # of each seed that began to train
    finished: Record

    @property
    def status(self) -> str:
        return str(self.finished.get("status", "still running or killed"))

    @property
    def fossilized(self) -> list[Record]:
        return [move for move in self.moves if move["stage"] == "FOSSILIZED"]

    def series(self, *path: str | int) -> list[float]:
        """One number per epoch; NaN where there is none."""
        return [_number(epoch, *path) for epoch in self.epochs]


def write_report(directory: Path) -> Path:
    """Write `report.html` into a run directory and return its path. The same events give the same
    bytes.

    Accuracies are in percent, contributions in percentage points, losses in nats. If a run has no
    events or was cut short, the page says so. If a file holds several runs, the last one is shown.

    Raises `FileNotFoundError` if the directory does not exist, `ImportError` without matplotlib,
    and `ValueError` if a line of `metrics.jsonl` other than the last is not JSON.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give the directory of a run")
    run = _read(directory)
    baseline = _read(directory / BASELINE)
    if run is None:
        title = "Nothing to report"
        parts = [_tag("p", f"{METRICS} is missing or contains no run.")]
    else:
        title = (
            f"{run.started['task']}, {run.started['mode']}, seed {run.started['seed']}: "
            f"{run.status}"
        )
        note = "The baseline (fit) is the same host network, trained without slots."
        parts = [_words(run), _summary({"run": run} | ({"baseline": baseline} if baseline else {}))]
        parts.append(_tag("p", note if baseline else "There is no baseline run."))
        growth = None
        with suppress(OSError, ValueError, TypeError):  # missing, or written by another version
            growth = load_config(directory).growth
        parts += [*_curves(run, baseline), *_stages(run, growth), *_gradients(run)]
        parts += [*_layers(run), *_rewards(run), *_seeds(run), *_costs(run)]
    return _write(directory / REPORT, title, parts)


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Write a page that compares several runs to `path`, and return the path.

    Raises `ValueError` for a directory without a run, and otherwise the errors of `write_report`.
    """
    runs = {str(d): run for d in directories if (run := _read(d))}
    panels = []
    if missing := [str(d) for d in directories if str(d) not in runs]:
        raise ValueError(f"no run in {', '.join(missing)}: {METRICS} is missing or contains none")
    for key, unit in (("loss", "validation loss (nats)"), ("accuracy", "validation accuracy (%)")):
        curves = [
            (n, r.series("validation", key), {"color": f"C{i}"})
            for i, (n, r) in enumerate(runs.items())
        ]
        panels += _panel(unit, curves, log=key == "loss", columns=1)
    height = 4 + 0.3 * len(runs)  # the legend has one line per run
    picture = _picture("comparison", "Validation loss and accuracy of each run", panels, height)
    return _write(path, f"Comparison of {len(runs)} runs", [_summary(runs), *picture])


def _write(path: Path, title: str, parts: Iterable[str]) -> Path:
    page = PAGE.format(title=_tag("title", title), body="\n".join([_tag("h1", title), *parts]))
    write_file(path, page.encode())
    return path


def _read(directory: Path) -> _Run | None:
    """The last run in the metrics of a directory; None if there is none."""
    events = read_metrics(directory) if (directory / METRICS).is_file() else []
    starts = [place for place, event in enumerate(events) if event["event"] == "run_started"]
    if not starts:
        return None
    kinds: dict[str, list[Record]] = defaultdict(list)
    for event in events[starts[-1] :]:
        kinds["trouble" if "message" in event else event["event"]].append(event)
        if event["event"] == "rollback":
            kinds["seed_stage"] = [
                move for move in kinds["seed_stage"] if move["epoch"] <= event["to_epoch"]
            ]
    start, *ends = kinds["run_started"] + kinds["run_finished"]
    known = {event["epoch"]: event for event in kinds["epoch"]}
    epochs = [known.get(epoch, {}) for epoch in range(1, 1 + max(known, default=0))]
    more = kinds["seed_stage"], kinds["trouble"], kinds["layer_gradients"], kinds["seed_cost"]
    return _Run(start, epochs, *more, ends[0] if ends else {})


def _words(run: _Run) -> str:
    start = run.started
    why = run.finished.get("error")
    last = (run.epochs or [run.started])[-1]
    where = (
        f"{len(run.epochs)} of {last['max_epochs']} epochs on {start['device']} "
        f"({start['backend']})"
    )
    lines = [f"Status: {run.status}, {where}.", *([f"What ended the run: {why}."] if why else [])]
    return _tag(
        "p",
        " ".join(
            lines + [f"In epoch {event['epoch']}: {event['message']}." for event in run.troubles]
        ),
    )


def _summary(runs: Mapping[str, _Run]) -> str:
    def column(name: str, r: _Run) -> dict[str, str]:
        accuracy = r.series("validation", "accuracy")
        loss = r.series("validation", "loss")
        return {
            "": name,
            "status": r.status,
            "test accuracy": _show(_number(r.finished, "test", "accuracy"), ".2f", "%"),
            "best validation accuracy": _show(max(_finite(accuracy), default=None), ".2f", "%"),
            "last validation accuracy": _show(accuracy[-1] if accuracy else None, ".2f", "%"),
            "last validation loss": _show(loss[-1], ".4f", none="not finite")
            if loss
            else "not measured",
            "parameters": _show(r.finished.get("parameters"), ","),
            "parameters of the host": _show(r.started["host_parameters"], ","),
            "network given": _given(r.finished),
            "seeds fossilized": str(len(r.fossilized)),
            "epochs undone": _show(r.finished.get("undone_epochs"), "d"),
            "seconds": _show(r.finished.get("seconds"), ".1f"),
        }

    columns = [column(name, run) for name, run in runs.items()]
    return _table([name, *(c[name] for c in columns)] for name in columns[0])


def _given(finished: Record) -> str:
    """Which epoch's network the run left, and by which rule."""
    epoch = finished.get("kept_epoch")
    return "not known" if epoch is None else f"{finished['keep']}, of epoch {epoch}"


def _costs(run: _Run) -> list[str]:
    """What each kind of seed costs while it trains, counted and by the clock."""
    heading = _tag("h2", "Cost of a seed in TRAINING")
    if not run.costs:
        return [heading, _tag("p", "No cost was reported.")]
    rows = [["slot", "blueprint", "multiply-adds of an epoch", "time of an epoch", ""]]
    alone = [
        _number(epoch, "train", "seconds") for epoch in run.epochs if epoch and not _training(epoch)
    ]
    for cost in run.costs:
        slot = cost["slot"]
        beside = [
            _number(epoch, "train", "seconds")
            for epoch in run.epochs
            if epoch
            and [(s["slot"], s["blueprint"]) for s in _training(epoch)]
            == [(slot, cost["blueprint"])]
        ]
        time = _median(beside) / _median(alone)
        dear = "costs more than the host" if cost["seed"] > cost["host"] else ""
        rows.append(
            [slot, cost["blueprint"], f"{cost['ratio']:.2f}x", _show(time, ".2f", "x"), dear]
        )
    note = (
        "As a multiple of an epoch without a seed in TRAINING: for the network's batches and "
        "the seed's own passes."
    )
    return [heading, _table(rows), _tag("p", note)]


def _training(epoch: Record) -> list[Record]:
    return [slot for slot in epoch["slots"] if slot["stage"] == "TRAINING"]


def _median(values: Sequence[float]) -> float:
    finite = _finite(values)
    return median(finite) if finite else math.nan


def _curves(run: _Run, baseline: _Run | None) -> list[str]:
    panels: list[Panel] = []
    for key, unit in (("loss", "loss (nats)"), ("accuracy", "accuracy (%)")):
        curves = [
            (name, run.series(name, key), {"color": f"C{i}"})
            for i, name in enumerate(("train", "validation"))
        ]
        if baseline:
            curves.append(
                (
                    "baseline's validation",
                    baseline.series("validation", key),
                    {"color": GREY, "ls": "--"},
                )
            )
        panels += _panel(unit, curves, log=key == "loss", moves=run.moves)
    picture = _picture("curves", "Loss and accuracy over epochs", panels)
    return [
        _tag("h2", "Loss and accuracy"),
        *(picture or [_tag("p", "There is no finite number to draw.")]),
    ]


def _stages(run: _Run, growth: GrowthConfig | None) -> list[str]:
    heading = _tag("h2", "Slots")
    slots = run.started["slots"]
    if not run.moves:
        why = "No seed was germinated." if slots else "This run had no slots to grow in."
        return [heading, _tag("p", why)]

    def draw(axes: Axes) -> None:
        seen: dict[str, Any] = {}
        for place in range(len(slots)):
            stages = [epoch["slots"][place]["stage"] if epoch else None for epoch in run.epochs]
            for stage, span in groupby(range(len(stages)), key=stages.__getitem__):
                first, *more = span
                if stage is not None:
                    seen[stage] = axes.barh(
                        place, 1 + len(more), 0.8, first + 0.5, color=STAGE_COLORS[stage]
                    )
        axes.set_yticks(range(len(slots)), slots)
        axes.set_ylim(len(slots) - 0.5, -0.5)
        names = [name for name in STAGE_COLORS if name in seen]
        _legend(axes, handles=[seen[name] for name in names], labels=names)

    panels: list[Panel] = [draw]
    measured = {
        "alpha": "alpha",
        "gradient_ratio": "seed / host gradient",
        "contribution": "contribution (points)",
    }
    for key, name in measured.items():
        curves = [
            (slot, run.series("slots", i, key), {"color": f"C{i + 1}"})
            for i, slot in enumerate(slots)
        ]
        if growth and key == "contribution":
            least = [growth.fossilize_contribution] * len(run.epochs)
            how = {"color": GREY, "ls": "--", "marker": ""}
            curves.append((f"needed to fossilize: {least[0]:g}", least, how))
        panels += _panel(name, curves, log=key == "gradient_ratio")
    note = (
        "Alpha is the seed's share of the slot's output. The ratio is corrected for the "
        "parameter counts."
    )
    title = "Stage, alpha, gradient ratio and contribution of each slot over epochs"
    return [heading, *_picture("stages", title, panels), _tag("p", note)]


def _gradients(run: _Run) -> list[str]:
    heading = _tag("h2", "Gradients")
    curves = [("total", run.series("grad", "gradient_norm"), WIDE)]
    for i, name in enumerate(("host", *run.started["slots"])):
        norms, tensors = (
            run.series("grad", "groups", name, key) for key in ("gradient_norm", "tensors")
        )
        # the norm of no tensors is 0, which is not a measurement
        if any(count > 0 for count in tensors):
            curves.append((name, norms, {"color": f"C{i}"}))
    health = "all gradients", run.series("grad", "gradient_health"), {"color": "black"}
    panels = _panel("gradient norm", curves, log=True) + _panel(
        "health", [health], limits=(-0.05, 1.05)
    )
    if not panels:
        return [heading, _tag("p", "Gradients were not measured.")]
    note = "A gap is an epoch without a measurement. A line that leaves a log scale has reached 0."
    picture = _picture("gradients", "Gradient norms and health over epochs", panels)
    return [heading, *picture, _tag("p", note)]


def _layers(run: _Run) -> list[str]:
    heading = _tag("h2", "Gradients by layer")
    norms = {event["epoch"]: event["norms"] for event in run.layers}
    names = list(dict.fromkeys(name for event in norms.values() for name in event))
    if not names:
        return [
            heading,
            _tag(
                "p",
                "Gradients by layer are reported at telemetry level debug, and after bad numbers.",
            ),
        ]
    size = [
        [math.log10(norms.get(i, {}).get(name) or math.nan) for i in range(1, 1 + max(norms))]
        for name in names
    ]
    decades = _finite(value for row in size for value in row) or [0.0]
    bad = [
        (i, row)
        for i, event in norms.items()
        for row, name in enumerate(names)
        if event.get(name, 0) is None
    ]

    def draw(axes: Axes) -> None:
        from matplotlib.colors import BoundaryNorm

        edges = [
            [i + 0.5 for i in range(1 + max(norms))],
            [row - 0.5 for row in range(1 + len(names))],
        ]
        steps = BoundaryNorm(range(math.floor(min(decades)), math.floor(max(decades)) + 2), 256)
        mesh = axes.pcolormesh(*edges, size, norm=steps)
        axes.figure.colorbar(mesh, ax=axes, label="log10 of the gradient norm")
        if bad:
            axes.plot(*zip(*bad, strict=True), "rx", ms=4, label="not finite")
            _legend(axes)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.5, -0.5)

    picture = _picture(
        "layers", "Gradient norm of each parameter over epochs", [draw], 1 + 0.16 * len(names)
    )
    note = "Measured on the last batch of an epoch. White: not reported, no gradient, or 0."
    return [heading, "<div>", *picture, "</div>", _tag("p", note)]


def _rewards(run: _Run) -> list[str]:
    names = dict.fromkeys(name for epoch in run.epochs for name in epoch.get("reward_parts") or ())
    parts = [
        (name, run.series("reward_parts", name), {"color": f"C{i}"}) for i, name in enumerate(names)
    ]
    curves = [
        ("reward", run.series("reward"), WIDE),
        *(part for part in parts if any(_finite(part[1]))),
    ]
    return [
        _tag("h2", "Rewards"),
        *_picture("rewards", "Rewards and their parts", _panel("reward", curves)),
    ]


def _seeds(run: _Run) -> list[str]:
    heading = _tag("h2", "Seeds")
    if not run.moves:
        return [heading, _tag("p", "There was no seed in this run.")]
    note = (
        "Stages change at the end of an epoch. Contributions are percentage points of "
        "validation accuracy."
    )
    if not run.fossilized:
        note = f"No seed was fossilized. {note}"
    columns = [
        "seed",
        "slot",
        "blueprint",
        "germinated",
        "end",
        "epoch",
        "contribution",
        "parameters",
        "reason",
    ]
    return [heading, _table([columns, *_lives(run)]), _tag("p", note)]


def _lives(run: _Run) -> Iterator[list[str]]:
    """One row per seed: its germination and its end, or the last stage and contribution if it has
    no end."""
    for seed in dict.fromkeys(move["seed_id"] for move in run.moves if move["seed_id"] is not None):
        moves = [move for move in run.moves if move["seed_id"] == seed]
        end = next((move for move in moves if move["stage"] in ("FOSSILIZED", "CULLED")), None)
        last = newest = end or moves[-1]
        if end is None and run.epochs:
            newest = next(
                (slot for slot in run.epochs[-1]["slots"] if slot["seed_id"] == seed), last
            )
        row = [seed, last["slot"], last["blueprint"], moves[0]["epoch"]]
        row += [last["stage"] if end else f"open ({last['stage']})", last["epoch"]]
        row += [
            _show(newest["contribution"], "+.2f"),
            f"{last['seed_parameters']:,}",
            last["reason"],
        ]
        yield [str(cell) for cell in row]


def _panel(
    name: str,
    curves: Sequence[Curve],
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    moves: Sequence[Record] = (),
    columns: int = 4,
) -> list[Panel]:
    """One panel of curves over the epochs, with marks where seeds were fossilized or culled.

    The list is empty if no curve has a finite number.
    """
    drawn = [curve for curve in curves if _finite(curve[1])]
    positive = [value for _, values, _ in drawn for value in _finite(values) if value > 0]

    def draw(axes: Axes) -> None:
        for label, values, how in drawn:
            # A marker also shows a single value between two gaps.
            axes.plot(
                range(1, 1 + len(values)),
                values,
                label=label,
                **{"lw": 1.2, "marker": ".", "ms": 3, **how},
            )
        # Over less than two decades, a log scale may have no labelled tick.
        if log and positive and max(positive) > 100 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the default uses mathematical text
            axes.yaxis.set_minor_formatter("")
        if limits:
            axes.set_ylim(*limits)
        for stage, ls in (("FOSSILIZED", "-"), ("CULLED", "--")):
            at = [move["epoch"] + 0.5 for move in moves if move["stage"] == stage]
            if at:
                heights = axes.get_xaxis_transform()
                color = STAGE_COLORS[stage]
                axes.vlines(
                    at, 0, 1, transform=heights, color=color, lw=1, ls=ls, label=stage.lower()
                )
        axes.set_ylabel(name)
        _legend(axes, columns=columns)

    return [draw] if drawn else []


def _legend(axes: Axes, columns: int = 4, **given: Any) -> None:
    """Put the legend above the panel, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, **given)


def _picture(
    name: str, title: str, panels: Sequence[Panel], height: float | None = None
) -> list[str]:
    """The panels below each other as one inline SVG; an empty list without panels.

    `name` must be unique on the page.
    """
    if not panels:
        return []
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the report's pictures need matplotlib: install esper-kernels[train]"
        ) from error
    with style.context(["default", dict(STYLE)]):
        figure = Figure(figsize=(5.0, height or 0.5 + 1.8 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, draw in zip(rows, panels, strict=True):
            draw(axes)
        axes.set(xlabel="epoch", xlim=(0.5, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = f'<svg role="img" aria-label="{escape(title)}"' + svg[svg.index("<svg") + 4 :]
    # matplotlib's ids start anew in each picture, but must be unique on a page.
    return [re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)]


def _number(record: Any, *path: str | int) -> float:
    """The number at the end of the path; NaN if it is null or the path does not exist."""
    with suppress(LookupError, TypeError):
        for key in path:
            record = record[key]
        return float(record)
    return math.nan


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _show(value: float | None, form: str, unit: str = "", *, none: str = "not measured") -> str:
    return none if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _table(rows: Iterable[Iterable[str]]) -> str:
    """An HTML table; the first row is its header."""
    lines = ["".join(_tag("td" if i else "th", cell) for cell in row) for i, row in enumerate(rows)]
    return "<div><table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"
