"""The decisions of a controller over the epochs, their rewards, and the probability of each action
where the controller has probabilities."""

import math
from collections.abc import Mapping
from pathlib import Path

from esper_train.control.policy import Op
from esper_train.run.report.draw import Axes, Curve, curve_panel, draw_picture, legend
from esper_train.run.report.history import History, finite_values, number_at
from esper_train.run.report.page import show, table, tag

MARKS: Mapping[str, tuple[str, str]] = {
    "GERMINATE": ("^", "#009e73"),
    "FOSSILIZE": ("s", "#0072b2"),
    "CULL": ("x", "#d55e00"),
}
"""Operation to its mark and colour; WAIT has none."""
SHOWN = 7
"""Actions whose probabilities are drawn: those with the highest at any time."""


def decisions_part(run: History) -> list[str]:
    """Probabilities along the episode; nothing for a controller that has none."""
    shares = [epoch.get("decision", {}).get("probabilities") or {} for epoch in run.epochs]
    highest: dict[str, float] = {}
    for each in shares:
        for name, share in each.items():
            highest[name] = max(share, highest.get(name, 0.0))
    if not highest:
        return []
    names = sorted(highest, key=lambda name: -highest[name])[:SHOWN]
    curves: list[Curve] = [
        (name, [each.get(name, math.nan) for each in shares], {}) for name in names
    ]
    panel = curve_panel("probability", curves, limits=(0, 1), moves=run.moves, columns=2)
    note = "The policy decides among the legal actions by these. A gap: it was not legal."
    title = "Probability of each action over epochs"
    return [
        tag("h2", "Decisions"),
        *draw_picture("decisions", title, panel, 3.2),
        tag("p", note),
    ]


def decisions_of_runs(runs: Mapping[str, History]) -> list[str]:
    """Controllers side by side: returns by part, and decisions over the epochs."""
    names = dict.fromkeys(
        name
        for run in runs.values()
        for epoch in run.epochs
        for name in epoch.get("reward_parts") or ()
    )
    rows = [["run", "controller", "return", *names, *(op.name.lower() for op in Op)]]
    for label, run in runs.items():
        counts = run.finished.get("action_counts", {})
        rows.append(
            [
                label,
                str(run.started.get("policy", "not known")),
                show(math.fsum(finite_values(run.series("reward"))), "+.2f"),
                *(
                    show(math.fsum(finite_values(run.series("reward_parts", name))), "+.2f")
                    for name in names
                ),
                *(show(number_at(counts, op.name), ".0f") for op in Op),
            ]
        )

    def draw(axes: Axes) -> None:
        for op, (mark, color) in MARKS.items():
            places = [
                (number, row)
                for row, run in enumerate(runs.values())
                for number, epoch in enumerate(run.epochs, start=1)
                if epoch.get("decision", {}).get("op") == op and not epoch.get("refused")
            ]
            if places:
                axes.plot(*zip(*places, strict=True), mark, color=color, label=op.lower())
        axes.set_yticks(range(len(runs)), [Path(label).name for label in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(0, 1 + max((len(run.epochs) for run in runs.values()), default=1))
        if axes.get_legend_handles_labels()[0]:
            legend(axes)

    height = 1.2 + 0.3 * len(runs)
    title = "Decisions of each run over epochs"
    return [
        tag("h2", "Decisions and what they earned"),
        table(rows),
        *draw_picture("decisions", title, [draw], height),
    ]
