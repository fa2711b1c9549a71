"""Panels of curves as inline SVG pictures; the only module of the report that draws with
matplotlib, which escapes the text."""

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import dropwhile
from operator import gt
from typing import Any

from esper_train.morph.lifecycle import SeedStage
from esper_train.run.report.history import Record, finite_values

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


def curve_panel(
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
    drawn = [curve for curve in curves if finite_values(curve[1])]
    positive = [value for _, values, _ in drawn for value in finite_values(values) if value > 0]

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
        else:
            axes.yaxis.get_major_locator().set_params(nbins=6, steps=[1, 2, 5, 10])
            axes.ticklabel_format(axis="y", useOffset=False)
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
        legend(axes, columns=columns)

    return [draw] if drawn else []


def zoomed(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of an axis that show where the curves stay, without their first rise; None if that
    leaves more than half of the whole range.

    A rise ends where a curve first reaches its lower quartile, so that a later fall is shown.
    """
    known = [values for _, curve, _ in curves if (values := finite_values(curve))]
    if not known:
        return None
    quartiles = [sorted(values)[len(values) // 4] for values in known]
    low = min(
        min(dropwhile(partial(gt, quartile), values))
        for values, quartile in zip(known, quartiles, strict=True)
    )
    high, lowest = max(map(max, known)), min(map(min, known))
    if high - low >= (high - lowest) / 2:
        return None
    margin = max(0.05 * (high - low), 1e-3 * abs(high))
    return low - margin, high + margin


def legend(axes: Axes, columns: int = 4, **given: Any) -> None:
    """Put the legend above the panel, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, **given)


def require_matplotlib() -> None:
    """`ImportError` where pictures could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "the report's pictures need matplotlib: pip install 'esper-kernels[train]'"
        )


def draw_picture(
    name: str,
    title: str,
    panels: Sequence[Panel],
    height: float | None = None,
    over_epochs: bool = True,
) -> list[str]:
    """The panels below each other as one inline SVG; an empty list without panels.

    over_epochs: the panels share an axis of epochs; otherwise each has named its own. `name` must
    be unique on the page.
    """
    if not panels:
        return []
    require_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", dict(STYLE)]):
        figure = Figure(figsize=(5.0, height or 0.5 + 1.8 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), sharex=over_epochs, squeeze=False)[:, 0]
        for axes, draw in zip(rows, panels, strict=True):
            draw(axes)
        if over_epochs:
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
