"""The report shows what the events say, on one complete page that escapes all text."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from esper_train.config import RunConfig
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.run import directory as run_directory
from esper_train.run.report import write_comparison, write_report
from esper_train.run.start import run_heuristic_episode
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import JsonlSink
from tests.helpers.reports import (
    EPOCHS,
    HOSTILE,
    Page,
    epoch_event,
    finished,
    fit,
    grown,
    move,
    page,
    started,
    write,
)

pytest.importorskip("matplotlib")
of_words = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A completed run with a fossil, a cull, a config and a baseline."""
    growth = GrowthConfig(fossilize_contribution=1.75)
    directory = run_directory.create(tmp_path / "run", RunConfig(growth=growth))
    write(directory / "baseline", *fit())
    return write(directory, *grown(), finished())


@of_words
def test_tables_hold_the_numbers_of_the_events(run: Path) -> None:
    shown = page(run)
    assert shown.row("") == ["run", "baseline"]
    assert shown.row("status") == ["completed", "completed"]
    assert shown.row("test accuracy") == ["93.25%", "91.75%"]
    assert shown.row("best validation accuracy") == ["82.00%", "78.00%"]
    assert shown.row("last validation accuracy") == ["82.00%", "78.00%"]
    assert shown.row("last validation loss") == ["0.3125", "0.3125"]
    assert shown.row("parameters") == ["12,345", "12,345"]
    assert shown.row("parameters of the host") == ["1,009", "1,009"]
    assert shown.row("seeds fossilized") == ["1", "0"]
    assert shown.row("seconds") == ["4.2", "4.2"]
    assert shown.row("seed_0") == [
        "early",
        "conv_expand",
        "1",
        "FOSSILIZED",
        "5",
        "+2.50",
        "1,387",
        "G5 passed",
    ]
    assert shown.row("seed_1") == [
        "mid",
        "norm",
        "2",
        "CULLED",
        "6",
        "not measured",
        "13",
        "training_timeout",
    ]


@of_words
def test_heading_says_what_came_of_the_run(run: Path) -> None:
    text = page(run).text
    assert "digits, heuristic, seed 7: completed" in text
    assert "8 of 8 epochs on cpu (eager)" in text


@of_words
def test_best_accuracy_is_not_the_last(tmp_path: Path) -> None:
    write(
        tmp_path,
        started(),
        *(epoch_event(i, accuracy=a) for i, a in ((1, 40.0), (2, 66.5), (3, 61.25))),
    )
    assert page(tmp_path).row("best validation accuracy") == ["66.50%"]
    assert page(tmp_path).row("last validation accuracy") == ["61.25%"]


def test_pictures_show_curves_slots_and_gradients(run: Path) -> None:
    curves, stages, gradients = page(run).pictures.values()
    for word in (
        "train",
        "validation",
        "baseline's validation",
        "fossilized",
        "culled",
        "loss (nats)",
    ):
        assert word in curves
    for word in ("early", "mid", "TRAINING", "BLENDING", "PROBATIONARY", "FOSSILIZED", "EMBARGOED"):
        assert word in stages
    for word in (
        "alpha",
        "seed / host gradient",
        "contribution (points)",
        "needed to fossilize: 1.75",
    ):
        assert word in stages
    assert "GERMINATED" not in stages  # no epoch was trained in it
    for word in ("gradient norm", "health", "host", "total"):
        assert word in gradients


@pytest.mark.parametrize(
    ("accuracies", "ticks", "hidden"),
    [
        ((95.1, 95.12, 95.15, 95.2, 95.16, 95.1, 95.3, 95.3), ["95.10", "95.20", "95.30"], None),
        ((10.0, 95.1, 95.2, 95.3, 94.9, 95.1, 95.3, 95.2), ["95.0", "95.2"], "94.8%"),
        ((90.0, 94.0, 95.0, 96.0, 20.0, 96.0, 97.0, 97.0), ["20", "40", "80"], None),  # a fall
        ((96.0,) * 8, ["96"], None),
    ],
)
def test_the_axis_of_accuracies_shows_where_they_stay(
    tmp_path: Path, accuracies: tuple[float, ...], ticks: list[str], hidden: str | None
) -> None:
    """The axis is tested in one report and in a comparison."""
    events = [
        epoch_event(i, accuracy=x, train_accuracy=x) for i, x in enumerate(accuracies, start=1)
    ]
    run = write(tmp_path / "run", started(), *events, finished())
    both = Page(write_comparison([run], tmp_path / "comparison.html").read_text())
    for shown, label in (
        (page(run), "Loss and accuracy over epochs"),
        (both, "Validation loss and accuracy of each run"),
    ):
        axis = shown.pictures[label].split("accuracy (%)")[0]
        assert set(ticks) <= set(axis.split()), axis
        note = f"The first rise of the accuracy, below {hidden}, is not shown."
        assert (note if hidden else "") in shown.text
        assert ("first rise" in shown.text) == (hidden is not None)


def test_page_is_whole_and_loads_nothing(run: Path) -> None:
    shown = page(run)
    assert ("html", "lang", "en") in shown.attributes
    assert ("meta", "name", "viewport") in shown.attributes
    assert shown.tags["title"] == 1
    assert not {"script", "link", "img", "image", "iframe", "object", "embed"} & set(shown.tags)
    for _, name, value in shown.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "data")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("url(") == text.count("url(#")
    assert "@import" not in text


def test_ids_are_unique_and_every_reference_has_one(run: Path) -> None:
    attributes = page(run).attributes
    ids = Counter(value for _, name, value in attributes if name == "id")
    assert set(ids.values()) == {1}
    assert {value[1:] for _, name, value in attributes if name == "xlink:href"} <= set(ids)
    clips = {value[5:-1] for _, name, value in attributes if name == "clip-path"}
    assert clips
    assert clips <= set(ids)


def test_same_events_give_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    events = grown(task=HOSTILE, reason=HOSTILE, blueprint=HOSTILE)
    events.append(Event(EventType.LAYER_GRADIENTS, 3, {"norms": {HOSTILE: 1.0, "fine": None}}))
    events.append(Event(EventType.FINDING, 3, {"kind": HOSTILE, "message": HOSTILE}))
    kept = dataclasses.replace(
        SlotState(slot="mid"), seed_id=HOSTILE, blueprint=HOSTILE, contribution=1.0
    )
    events.append(move(EPOCHS, kept, SeedStage.FOSSILIZED, HOSTILE))
    shown = page(write(tmp_path, *events, finished(status=HOSTILE, error=HOSTILE)))
    assert shown.tags["script"] == 0
    assert f"{HOSTILE}, heuristic, seed 7: {HOSTILE}" in shown.text
    assert shown.row("seed_1")[1] == HOSTILE
    assert shown.row("seed_1")[-1] == HOSTILE
    assert shown.row("status") == [HOSTILE]
    assert f"What ended the run: {HOSTILE}. In epoch 3: {HOSTILE}." in shown.text
    assert HOSTILE in shown.pictures["Gradient norm of each parameter over epochs"]


def test_unknown_threshold_is_not_drawn(tmp_path: Path) -> None:
    shown = page(write(tmp_path, *grown(), finished()))
    assert "needed to fossilize" not in "".join(shown.pictures.values())


def test_missing_matplotlib_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"esper-kernels\[train\]"):
        write_report(run)


def test_settings_of_matplotlib_stay_as_they_were(run: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(run)
    assert dict(matplotlib.rcParams) == before


@of_words
def test_events_of_a_real_run(tmp_path: Path) -> None:
    config = RunConfig(task="synthetic", max_epochs=3, max_batches=2)
    directory = run_directory.create(tmp_path / "run", config)
    hub = TelemetryHub([JsonlSink(directory / run_directory.METRICS)])
    result = run_heuristic_episode(config, hub=hub)
    hub.close()
    shown = page(directory)
    assert shown.row("test accuracy") == [f"{result.test.points:.2f}%"]
    assert shown.row("last validation accuracy") == [f"{100 * result.accuracy:.2f}%"]
    assert shown.row("parameters") == [f"{result.parameters:,}"]
    assert list(shown.pictures) == [
        "Loss and accuracy over epochs",
        "Gradient norms and health over epochs",
        "Rewards and their parts",
    ]


def test_gradients_by_layer(tmp_path: Path) -> None:
    """A cell for each epoch and parameter, and a cross where the norm was not finite; a seed's
    layer came later."""
    events = [started(), *(epoch_event(i) for i in range(1, 5))]
    for epoch, norms in (
        (1, {"head": 1e-3}),
        (2, {"head": 0.0, "seed": 10.0}),
        (4, {"head": math.nan, "seed": 2.0}),
    ):
        events.append(Event(EventType.LAYER_GRADIENTS, epoch, {"norms": norms}))
    directory = write(tmp_path, *events)
    picture = page(directory).pictures["Gradient norm of each parameter over epochs"]
    for word in ("head", "seed", "not finite", "log10 of the gradient norm", "-3", "1"):
        assert word in picture.replace("\u2212", "-")
    assert "not finite" not in page(write(tmp_path / "fine", *events[:-1])).pictures.popitem()[1]


@of_words
def test_layers_that_were_not_reported_are_said(run: Path) -> None:
    assert "Gradients by layer are reported at telemetry level debug" in page(run).text


def test_rewards_are_drawn_by_parts(tmp_path: Path) -> None:
    parts = {"attribution": 1.0, "rent": -0.25, "final": 0.0}
    events = [started()]
    for epoch in (1, 2, 3):
        event = epoch_event(epoch)
        events.append(
            Event(EventType.EPOCH, epoch, {**event.data, "reward": 0.75, "reward_parts": parts})
        )
    picture = page(write(tmp_path, *events)).pictures["Rewards and their parts"]
    for word in ("reward", "attribution", "rent"):
        assert word in picture
    assert "final" not in picture  # never anything but 0
