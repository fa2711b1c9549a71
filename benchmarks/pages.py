"""The tables and the pictures of README.md and docs/, made from the committed results.

    python -m benchmarks pages    # after results/*.json have changed

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`, where NAME is a key of `TABLES`
or of `DESCRIPTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    before,
    classes_first,
    cpu,
    epoch,
    gate,
    growth,
    growth_variants,
    host_time,
    hosts,
    instructions,
    linear,
    linear_run,
    logprobs,
    measures,
    ppo,
    record,
    seed_cost,
)
from benchmarks.sass import table as sass
from esper_train import SeedStage
from esper_train.rl.observation import RUN_FIELDS, SLOT_FIELDS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "docs/rl.md")
PICTURE = ROOT / "docs" / "pictures" / "cpu.svg"
LEARNING = ROOT / "docs" / "pictures" / "ppo.svg"
GROWTH = ROOT / "docs" / "pictures" / "growth.svg"


def observation_table() -> str:
    """Every field of an observation, with its range."""
    rows = [["field", "range", "meaning"]]
    rows += [[f.name, f"{f.low:g} to {f.high:g}", f.meaning] for f in RUN_FIELDS]
    flags = [
        ["stage, one field each", "0 or 1", ", ".join(stage.name for stage in SeedStage)],
        ["blueprint, one field each", "0 or 1", "those for the host's topology, in their order"],
    ]
    rows += [[f"per slot: {name}", *rest] for name, *rest in flags]
    rows += [[f"per slot: {f.name}", f"{f.low:g} to {f.high:g}", f.meaning] for f in SLOT_FIELDS]
    return record.markdown(rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "cpu in short": ("cpu", cpu.short_table),
    "cpu": ("cpu", cpu.table),
    "before": ("before", before.table),
    "cpu instructions": ("instructions", instructions.table),
    "gradient statistics": ("cpu", cpu.grad_table),
    "linear": ("linear", linear.table),
    "linear run": ("linear-run", linear_run.table),
    "classes first": ("classes-first", classes_first.table),
    "log-probabilities": ("logprobs", logprobs.table),
    "measures": ("measures", measures.table),
    "epoch": ("epoch", epoch.table),
    "growth in short": ("growth-digits", growth.in_short),
    "growth on digits": ("growth-digits", growth.table),
    "growth on breast cancer": ("growth-breast-cancer", growth.table),
    "growth on pysource": ("growth-pysource-short", growth.table),
    **{
        f"growth variants on {task.replace('-', ' ')}": (
            growth_variants.results_of(task),
            partial(growth_variants.table, task),
        )
        for task in ("digits", "breast-cancer")
    },
    "gate": ("gate", gate.table),
    "seed cost": ("seed-cost", seed_cost.table),
    "ppo on digits": ("ppo-digits-shaped", ppo.table),
    "ppo on digits, sparse": ("ppo-digits-sparse", ppo.table),
    "learning curve": ("ppo-digits-shaped", ppo.curve),
    "hosts": ("hosts", hosts.table),
    "host time": ("host-time", host_time.table),
    "sass": ("sass", sass.table),
    "sass purposes": ("sass", sass.by_purpose),
}
"""The results and the function that make each table."""
BY_MACHINE = {"cpu", "gradient statistics"}
"""Tables of results with one file per machine, all of which are shown; of other tables the last."""
DESCRIPTIONS: dict[str, Callable[[], str]] = {"observation": observation_table}
"""Tables that are made from the code alone."""
BARS = {"eager PyTorch": ("eager", "#9aa5b1"), "torch.compile": ("compile", "#5b7c99")}
"""The baselines of the picture: their names in the results, and colours."""


def filled(page: str) -> str:
    """The page with every table made anew; ValueError for a table that is not in `TABLES`."""
    return re.sub(
        r"<!-- (?!end of )(.+?) -->\n.*?<!-- end of \1 -->", _block, page, flags=re.DOTALL
    )


def _block(found: re.Match[str]) -> str:
    name = found[1]
    if name in DESCRIPTIONS:
        return f"<!-- {name} -->\n{DESCRIPTIONS[name]()}\n<!-- end of {name} -->"
    if name not in TABLES:
        raise ValueError(
            f"there is no table {name!r}; there are {', '.join(TABLES | DESCRIPTIONS)}"
        )
    results, table = TABLES[name]
    measured = record.of_machines(results) if results == "cpu" else [record.read(results)]
    shown = [(table(found["figures"]), caption(found["environment"])) for found in measured]
    if name not in BY_MACHINE:
        shown = shown[:1]
    lines = [line for made, under in shown for line in (made, "", under, "")][:-1]
    return "\n".join([f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"])


def caption(environment: dict[str, Any]) -> str:
    """One line that says when and where the figures were measured."""
    where = f"{environment['cpu']}, {environment['cores']} cores"
    versions = f"Python {environment['python']}, torch {environment['torch']}"
    day, commit = environment["date"][:10], environment["commit"]
    return f"*Measured {day} on {where}; {versions}; commit {commit}.*"


def speedups() -> tuple[list[str], dict[str, list[float]]]:
    """The shapes of the picture, and how many times faster a step is than each rival."""
    figures = record.of_machines("cpu")[0]["figures"]
    rows = [row for row in figures if not cpu.is_gradients(row)]
    times = [row["default"]["microseconds"] for row in rows]
    factors = {name: [t[key] / t["out"] for t in times] for name, (key, _) in BARS.items()}
    return [cpu.label(row) for row in rows], factors


def draw(path: Path) -> None:
    """Draw the speedups as bars."""
    shapes, factors = speedups()
    height = 0.8 / len(factors)
    with record.picture(path, 7.5, 4.2) as (axes,):
        for number, (name, values) in enumerate(factors.items()):
            places = [place + number * height for place in range(len(shapes))]
            bars = axes.barh(places, values, height, label=f"over {name}", color=BARS[name][1])
            axes.bar_label(bars, [f"{value:.3g}x" for value in values], padding=3, fontsize=8)
        axes.set_yticks([place + height / 2 for place in range(len(shapes))], shapes)
        axes.invert_yaxis()
        axes.set_xlabel("speedup of loss, counts and logits gradient together")
        axes.set_title(
            "cross_entropy_step on a CPU, for logits [rows x classes]", fontsize=11, loc="left"
        )
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, -0.16), ncols=2)


def main() -> None:
    """Write every table and picture."""
    record.parser("pages", __doc__).parse_args()
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
    draw(PICTURE)
    ppo.draw(LEARNING, record.read("ppo-digits-shaped")["figures"])
    growth.draw(GROWTH, {task: record.read(name)["figures"] for task, name in growth.DRAWN.items()})
    print(PICTURE, LEARNING, GROWTH, sep="\n")


if __name__ == "__main__":
    main()
