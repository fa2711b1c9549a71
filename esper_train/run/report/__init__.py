"""`report.html`: the events of a run in words, tables and pictures, on one page that opens offline.

`cli` calls `write_report`, and `write_comparison` for several runs. A page shows only what the runs
wrote: `metrics.jsonl`, the baseline's, `config.json` and `environment.json`. `history` reads what
was measured, `draw` and `pictures` draw it, `origin` says how it was made, `page` writes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from esper_train.base.settings import differing
from esper_train.run.directory import BASELINE, METRICS, REPORT, load_config, read_config
from esper_train.run.report.decisions import decisions_of_runs, decisions_part
from esper_train.run.report.draw import curve_panel, draw_picture, zoomed
from esper_train.run.report.history import (
    History,
    Record,
    finite_median,
    finite_values,
    in_training,
    number_at,
    read_history,
)
from esper_train.run.report.measures import measures_part
from esper_train.run.report.origin import origin_part
from esper_train.run.report.page import show, table, tag, write_page
from esper_train.run.report.pictures import (
    curves_part,
    gradients_part,
    layers_part,
    note_of_zoom,
    rewards_part,
    stages_part,
)


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
    run = read_history(directory)
    baseline = read_history(directory / BASELINE)
    if run is None:
        title = "Nothing to report"
        parts = [tag("p", f"{METRICS} is missing or contains no run.")]
    else:
        title = (
            f"{run.started['task']}, {run.started['mode']}, seed {run.started['seed']}: "
            f"{run.status}"
        )
        note = "The baseline (fit) is the same host network, trained without slots."
        parts = [_words(run), _summary({"run": run} | ({"baseline": baseline} if baseline else {}))]
        parts.append(tag("p", note if baseline else "There is no baseline run."))
        growth = None
        with suppress(OSError, ValueError, TypeError):  # missing, or written by another version
            growth = load_config(directory).growth
        parts += [*curves_part(run, baseline), *stages_part(run, growth), *gradients_part(run)]
        parts += [*measures_part(run), *layers_part(run), *rewards_part(run), *decisions_part(run)]
        parts += [*_seeds(run), *_costs(run), *origin_part(directory)]
    return write_page(directory / REPORT, title, parts)


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Write a page that compares several runs to `path`, and return the path.

    The page has their results, the settings that differ, and their validation curves.

    Raises `ValueError` for a directory without a run, and otherwise the errors of `write_report`.
    """
    runs = {str(d): run for d in directories if (run := read_history(d))}
    if missing := [str(d) for d in directories if str(d) not in runs]:
        raise ValueError(f"no run in {', '.join(missing)}: {METRICS} is missing or contains none")
    panels = []
    for key, unit in (("loss", "validation loss (nats)"), ("accuracy", "validation accuracy (%)")):
        curves = [
            (n, r.series("validation", key), {"color": f"C{i}"})
            for i, (n, r) in enumerate(runs.items())
        ]
        limits = zoomed(curves) if key == "accuracy" else None
        panels += curve_panel(unit, curves, log=key == "loss", limits=limits, columns=1)
    height = 4 + 0.3 * len(runs)  # the legend has one line per run
    picture = draw_picture("comparison", "Validation loss and accuracy of each run", panels, height)
    parts = [_summary(runs), *_settings(runs), *picture, *note_of_zoom(limits)]
    parts += decisions_of_runs(runs)
    return write_page(path, f"Comparison of {len(runs)} runs", parts)


def _settings(runs: Mapping[str, History]) -> list[str]:
    """The settings in which the runs differ, from their `config.json`."""
    known = {}
    for name, run in runs.items():
        with suppress(OSError, ValueError):  # missing or damaged
            known[name] = {"mode": run.started["mode"], **read_config(Path(name))}
    changed = differing(list(known.values()))
    rows = [[path, *map(_setting, values)] for path, values in changed.items()]
    parts = [tag("h2", "Settings that differ")]
    parts.append(table([["", *known], *rows]) if rows else tag("p", "None."))
    if unknown := [name for name in runs if name not in known]:
        parts.append(tag("p", f"The settings of {', '.join(unknown)} are not known."))
    return parts


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _words(run: History) -> str:
    start = run.started
    why = run.finished.get("error")
    last = (run.epochs or [run.started])[-1]
    where = (
        f"{len(run.epochs)} of {last['max_epochs']} epochs on {start['device']} "
        f"({start['backend']})"
    )
    lines = [f"Status: {run.status}, {where}.", *([f"What ended the run: {why}."] if why else [])]
    lines += [f"{_when(event)}: {event['message']}." for event in run.troubles]
    return tag("p", " ".join(lines))


def _when(event: Record) -> str:
    if event["event"] == "inexact_resume":
        return f"After epoch {event['epoch']}" if event["epoch"] else "At the start"
    return f"In epoch {event['epoch']}"


def _summary(runs: Mapping[str, History]) -> str:
    def column(name: str, r: History) -> dict[str, str]:
        accuracy = r.series("validation", "accuracy")
        loss = r.series("validation", "loss")
        return {
            "": name,
            "status": r.status,
            "test accuracy": show(number_at(r.finished, "test", "accuracy"), ".2f", "%"),
            "best validation accuracy": show(
                max(finite_values(accuracy), default=None), ".2f", "%"
            ),
            "last validation accuracy": show(accuracy[-1] if accuracy else None, ".2f", "%"),
            "last validation loss": show(loss[-1], ".4f", none="not finite")
            if loss
            else "not measured",
            "parameters": show(r.finished.get("parameters"), ","),
            "parameters of the host": show(r.started["host_parameters"], ","),
            "network given": _given(r.finished),
            "seeds fossilized": str(len(r.fossilized)),
            "epochs undone": show(r.finished.get("undone_epochs"), "d"),
            "training cost": show(r.finished.get("cost"), ".1f", " epochs of the host"),
            "seconds": show(r.finished.get("seconds"), ".1f"),
        }

    columns = [column(name, run) for name, run in runs.items()]
    return table([name, *(c[name] for c in columns)] for name in columns[0])


def _given(finished: Record) -> str:
    """The epoch whose network the run left, and the rule that chose it."""
    epoch = finished.get("kept_epoch")
    return "not known" if epoch is None else f"{finished['keep']}, of epoch {epoch}"


def _costs(run: History) -> list[str]:
    """The cost of each kind of seed while it trains: counted multiply-adds, and time."""
    heading = tag("h2", "Cost of a seed in TRAINING")
    if not run.costs:
        return [heading, tag("p", "No cost was reported.")]
    rows = [["slot", "blueprint", "multiply-adds of an epoch", "time of an epoch", ""]]
    alone = [
        number_at(epoch, "train", "seconds")
        for epoch in run.epochs
        if epoch and not in_training(epoch)
    ]
    for cost in run.costs:
        slot = cost["slot"]
        beside = [
            number_at(epoch, "train", "seconds")
            for epoch in run.epochs
            if epoch
            and [(s["slot"], s["blueprint"]) for s in in_training(epoch)]
            == [(slot, cost["blueprint"])]
        ]
        time = finite_median(beside) / finite_median(alone)
        dear = "costs more than the host" if cost["seed"] > cost["host"] else ""
        rows.append(
            [slot, cost["blueprint"], f"{cost['ratio']:.2f}x", show(time, ".2f", "x"), dear]
        )
    note = (
        "As a multiple of an epoch without a seed in TRAINING: for the network's batches and "
        "the seed's own passes."
    )
    return [heading, table(rows), tag("p", note)]


def _seeds(run: History) -> list[str]:
    heading = tag("h2", "Seeds")
    if not run.moves:
        return [heading, tag("p", "There was no seed in this run.")]
    note = (
        "Stages change at the end of an epoch. Contributions are percentage points of "
        "validation accuracy. G5 is the gate that decides whether a seed is kept."
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
    return [heading, table([columns, *_lives(run)]), tag("p", note)]


def _lives(run: History) -> Iterator[list[str]]:
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
            show(newest["contribution"], "+.2f"),
            f"{last['seed_parameters']:,}",
            last["reason"],
        ]
        yield [str(cell) for cell in row]
