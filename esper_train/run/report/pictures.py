"""The parts of a report that are pictures: curves, stages of slots, gradients, rewards."""

import math
from itertools import groupby
from typing import Any

from esper_train.morph.config import GrowthConfig
from esper_train.run.report.draw import (
    GREY,
    STAGE_COLORS,
    WIDE,
    Axes,
    Panel,
    curve_panel,
    draw_picture,
    legend,
    zoomed,
)
from esper_train.run.report.history import History, finite_values
from esper_train.run.report.page import tag


def curves_part(run: History, baseline: History | None) -> list[str]:
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
        panels += curve_panel(
            unit,
            curves,
            log=key == "loss",
            limits=zoomed(curves) if key == "accuracy" else None,
            moves=run.moves,
        )
    picture = draw_picture("curves", "Loss and accuracy over epochs", panels)
    return [
        tag("h2", "Loss and accuracy"),
        *(picture or [tag("p", "There is no finite number to draw.")]),
        *note_of_zoom(zoomed(curves)),
    ]


def note_of_zoom(limits: tuple[float, float] | None) -> list[str]:
    """Says that the axis of accuracies does not show all of them."""
    if limits is None:
        return []
    return [tag("p", f"The first rise of the accuracy, below {limits[0]:.3g}%, is not shown.")]


def stages_part(run: History, growth: GrowthConfig | None) -> list[str]:
    heading = tag("h2", "Slots")
    slots = run.started["slots"]
    if not run.moves:
        why = "No seed was germinated." if slots else "This run had no slots to grow in."
        return [heading, tag("p", why)]

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
        legend(axes, handles=[seen[name] for name in names], labels=names)

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
        panels += curve_panel(name, curves, log=key == "gradient_ratio")
    note = (
        "Alpha is the seed's share of the slot's output. The ratio is corrected for the "
        "parameter counts."
    )
    title = "Stage, alpha, gradient ratio and contribution of each slot over epochs"
    return [heading, *draw_picture("stages", title, panels), tag("p", note)]


def gradients_part(run: History) -> list[str]:
    heading = tag("h2", "Gradients")
    curves = [("total", run.series("grad", "gradient_norm"), WIDE)]
    for i, name in enumerate(("host", *run.started["slots"])):
        norms, tensors = (
            run.series("grad", "groups", name, key) for key in ("gradient_norm", "tensors")
        )
        # the norm of no tensors is 0, which is not a measurement
        if any(count > 0 for count in tensors):
            curves.append((name, norms, {"color": f"C{i}"}))
    health = "all gradients", run.series("grad", "gradient_health"), {"color": "black"}
    panels = curve_panel("gradient norm", curves, log=True) + curve_panel(
        "health", [health], limits=(-0.05, 1.05)
    )
    if not panels:
        return [heading, tag("p", "Gradients were not measured.")]
    note = "A gap is an epoch without a measurement. A line that leaves a log scale has reached 0."
    picture = draw_picture("gradients", "Gradient norms and health over epochs", panels)
    return [heading, *picture, tag("p", note)]


def layers_part(run: History) -> list[str]:
    heading = tag("h2", "Gradients by layer")
    norms = {event["epoch"]: event["norms"] for event in run.layers}
    names = list(dict.fromkeys(name for event in norms.values() for name in event))
    if not names:
        return [
            heading,
            tag(
                "p",
                "Gradients by layer are reported at telemetry level debug, and after bad numbers.",
            ),
        ]
    size = [
        [math.log10(norms.get(i, {}).get(name) or math.nan) for i in range(1, 1 + max(norms))]
        for name in names
    ]
    decades = finite_values(value for row in size for value in row) or [0.0]
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
            legend(axes)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.5, -0.5)

    picture = draw_picture(
        "layers", "Gradient norm of each parameter over epochs", [draw], 1 + 0.16 * len(names)
    )
    note = "Measured on the last batch of an epoch. White: not reported, no gradient, or 0."
    return [heading, "<div>", *picture, "</div>", tag("p", note)]


def rewards_part(run: History) -> list[str]:
    names = dict.fromkeys(name for epoch in run.epochs for name in epoch.get("reward_parts") or ())
    parts = [
        (name, run.series("reward_parts", name), {"color": f"C{i}"}) for i, name in enumerate(names)
    ]
    curves = [
        ("reward", run.series("reward"), WIDE),
        *(part for part in parts if any(finite_values(part[1]))),
    ]
    return [
        tag("h2", "Rewards"),
        *draw_picture("rewards", "Rewards and their parts", curve_panel("reward", curves)),
    ]
