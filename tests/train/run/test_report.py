"""The report says what the events say, in a page that is whole, stands alone and escapes all
text."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from esper_train.config import RunConfig
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.run import directory as run_directory
from esper_train.run.report import write_comparison, write_report
from esper_train.run.run import run_heuristic_episode
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import JsonlSink

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert(1)</script>\"'&$x$"
EPOCHS = 8
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Parses a page and keeps what the tests ask about; an unbalanced tag fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        """Words outside of pictures and styles."""
        self.pictures: dict[str, str] = {}
        """Label of a picture to the text in it."""
        self.picture = ""
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg":
            given = dict(attrs)
            assert given["role"] == "img"
            self.picture = given["aria-label"] or ""
            self.pictures[self.picture] = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if "svg" in self.open:
            self.pictures[self.picture] += data
        else:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row[0] == first]
        return found


def measures(loss: float, accuracy: float) -> dict[str, object]:
    return {"loss": loss, "accuracy": accuracy, "correct": {1: 5}, "valid": 10}


def health(norm: float, tensors: int = 2, groups: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "gradient_norm": norm,
        "gradient_health": 1.0,
        "has_vanishing": False,
        "has_exploding": False,
        "min_layer_norm": norm,
        "max_layer_norm": norm,
        "norm_ratio": 1.0,
        "zero_grad_fraction": 0.0,
        "nan_count": 0,
        "inf_count": 0,
        "tensors": tensors,
        "elements": 100,
        "groups": groups or {},
    }


def started(
    task: str = "digits", *, mode: str = "heuristic", slots: tuple[str, ...] = ("early", "mid")
) -> Event:
    data = {
        "mode": mode,
        "task": task,
        "seed": 7,
        "max_epochs": EPOCHS,
        "device": "cpu",
        "backend": "eager",
        "slots": list(slots),
        "host_parameters": 1009,
    }
    return Event(EventType.RUN_STARTED, 0, data)


def epoch_event(
    epoch: int,
    slots: tuple[SlotState, ...] = (),
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    grad: bool = True,
) -> Event:
    groups = {"host": health(1.0)} | {s.slot: health(0.5) for s in slots if s.seed_id is not None}
    validation = measures(
        2.5 / epoch if loss is None else loss, 50.0 + 4 * epoch if accuracy is None else accuracy
    )
    data = {
        "max_epochs": EPOCHS,
        "train": measures(2.0 / epoch, 60.0 + 4 * epoch)
        | {"compiled": False, "compile_failure": None},
        "validation": validation,
        "grad": health(1.2, groups=groups) if grad else None,
        "slots": [dataclasses.asdict(state) | {"stage": state.stage.name} for state in slots],
        "decision": {
            "op": "WAIT",
            "slot": None,
            "blueprint": None,
            "blend": None,
            "reason": "",
            "confidence": 1.0,
            "refused": None,
        },
        "seconds": 0.5,
    }
    return Event(EventType.EPOCH, epoch, data)


def move(epoch: int, before: SlotState, stage: SeedStage, reason: str) -> Event:
    data = dataclasses.asdict(before) | {
        "from": before.stage.name,
        "stage": stage.name,
        "reason": reason,
        "improvement": before.improvement,
        "total_improvement": before.total_improvement,
    }
    return Event(EventType.SEED_STAGE, epoch, data)


def seated(epoch: int, slot: str, seed: str, blueprint: str, parameters: int) -> list[Event]:
    empty = SlotState(slot=slot, seed_id=seed, blueprint=blueprint, seed_parameters=parameters)
    germinated = dataclasses.replace(empty, stage=SeedStage.GERMINATED)
    return [
        move(epoch, empty, SeedStage.GERMINATED, f"{blueprint} seated"),
        move(epoch, germinated, SeedStage.TRAINING, "training begins"),
    ]


def finished(
    epoch: int = EPOCHS,
    *,
    status: str = "completed",
    test: float | None = 93.25,
    error: str | None = None,
) -> Event:
    data = {
        "status": status,
        "error": error,
        "accuracy": 82.0,
        "test": None if test is None else measures(0.3, test),
        "parameters": 12345,
        "fossils": 1,
        "action_counts": {"WAIT": epoch, "GERMINATE": 0, "CULL": 0, "FOSSILIZE": 0},
        "seconds": 4.25,
    }
    return Event(EventType.RUN_FINISHED, epoch, data)


def write(directory: Path, *events: Event) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    sink = JsonlSink(directory / run_directory.METRICS)
    for event in events:
        sink.write(event)
    sink.close()
    return directory


def grown(
    *, task: str = "digits", reason: str = "training_timeout", blueprint: str = "norm", gap: int = 0
) -> list[Event]:
    """seed_0 lives in early from 1 to its fossilization at 5, seed_1 in mid from 2 to its cull at
    6."""
    stage = SeedStage
    life = {2: stage.TRAINING, 3: stage.BLENDING, 4: stage.PROBATIONARY, 5: stage.PROBATIONARY}
    events = [started(task)]
    for epoch in range(1, EPOCHS + 1):
        early = SlotState(slot="early")
        mid = SlotState(slot="mid")
        if epoch > 1:
            early = SlotState(
                slot="early",
                stage=life.get(epoch, stage.FOSSILIZED),
                seed_id="seed_0",
                blueprint="conv_expand",
                alpha=0.0 if epoch < 4 else 1.0,
                seed_parameters=1387,
                contribution=2.5 if epoch > 3 else None,
                gradient_ratio=0.5,
            )
        if 2 < epoch <= 6:
            mid = SlotState(
                slot="mid",
                stage=stage.TRAINING,
                seed_id="seed_1",
                blueprint=blueprint,
                seed_parameters=13,
            )
        elif epoch > 6:
            mid = SlotState(slot="mid", stage=stage.EMBARGOED)
        events.append(epoch_event(epoch, (early, mid), grad=epoch != gap))
        if epoch == 1:
            events += seated(1, "early", "seed_0", "conv_expand", 1387)
        if epoch == 2:
            events += seated(2, "mid", "seed_1", blueprint, 13)
        if epoch == 5:
            events.append(move(5, early, stage.FOSSILIZED, "G5 passed"))
        if epoch == 6:
            events.append(move(6, mid, stage.CULLED, reason))
            events.append(
                move(
                    6,
                    dataclasses.replace(mid, stage=stage.CULLED),
                    stage.EMBARGOED,
                    "closed for 5 epochs",
                )
            )
    return events


def fit(test: float = 91.75) -> list[Event]:
    epochs = [epoch_event(i, accuracy=70.0 + i) for i in range(1, EPOCHS + 1)]
    return [started(mode="fit", slots=()), *epochs, finished(test=test)]


def page(directory: Path) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A completed run with a fossil, a cull, a config and a baseline."""
    growth = GrowthConfig(fossilize_contribution=1.75)
    directory = run_directory.create(tmp_path / "run", RunConfig(growth=growth))
    write(directory / "baseline", *fit())
    return write(directory, *grown(), finished())


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


def test_heading_says_what_came_of_the_run(run: Path) -> None:
    text = page(run).text
    assert "digits, heuristic, seed 7: completed" in text
    assert "8 of 8 epochs on cpu (eager)" in text


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


def test_unmeasured_gradients_leave_gaps(tmp_path: Path) -> None:
    def marks(directory: Path) -> int:
        text = write_report(directory).read_text(encoding="utf-8")
        return text[text.index("<h2>Gradients") : text.index("<h2>Seeds")].count("<use ")

    whole = marks(write(tmp_path / "whole", *grown(), finished()))
    gap = marks(write(tmp_path / "gap", *grown(gap=4), finished()))
    # of epoch 4: the health and the norms of the whole, the host and both seeds
    assert whole - gap == 5


def test_group_without_tensors_was_not_measured(tmp_path: Path) -> None:
    def shown(tensors: int) -> str:
        first = epoch_event(1)
        groups = {"host": health(1.0), "early": health(0.0, tensors)}
        data = {**first.data, "grad": health(1.0, groups=groups), "slots": []}
        events = [
            started(slots=("early",)),
            Event(EventType.EPOCH, 1, data),
            Event(EventType.EPOCH, 2, data),
        ]
        return page(write(tmp_path / str(tensors), *events)).pictures[
            "Gradient norms and health over epochs"
        ]

    assert "early" not in shown(0)
    assert "early" in shown(2)


def test_gradients_never_measured(tmp_path: Path) -> None:
    events = [epoch_event(i, grad=False) for i in (1, 2, 3)]
    shown = page(write(tmp_path, started(mode="fit", slots=()), *events, finished(3)))
    assert "Gradients were not measured." in shown.text
    assert list(shown.pictures) == ["Loss and accuracy over epochs"]


def test_plain_training_has_no_slots_to_tell_of(tmp_path: Path) -> None:
    shown = page(write(tmp_path, *fit()))
    assert "digits, fit, seed 7: completed" in shown.text
    assert "This run had no slots to grow in." in shown.text
    assert "There was no seed in this run." in shown.text
    assert "There is no baseline run." in shown.text
    assert "No seed was fossilized" not in shown.text
    assert shown.row("test accuracy") == ["91.75%"]


def test_slots_without_a_seed(tmp_path: Path) -> None:
    slots = (SlotState(slot="early"), SlotState(slot="mid"))
    events = [epoch_event(i, slots) for i in (1, 2, 3)]
    shown = page(write(tmp_path, started(), *events, finished(3)))
    assert "No seed was germinated." in shown.text
    assert shown.row("seeds fossilized") == ["0"]
    assert len(shown.pictures) == 2


def test_killed_run_shows_what_it_reported(tmp_path: Path) -> None:
    # up to the move of epoch 5, which left seed_0 fossilized and seed_1 open
    events = grown()
    write(tmp_path, *events[: [e.data.get("stage") for e in events].index("FOSSILIZED") + 1])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "epoch", "epo')
    shown = page(tmp_path)
    assert "still running or killed, 5 of 8 epochs" in shown.text
    assert shown.row("seeds fossilized") == ["1"]
    assert shown.row("test accuracy") == shown.row("parameters") == ["not measured"]
    assert shown.row("seed_1")[3:6] == ["open (TRAINING)", "2", "not measured"]


def test_interrupted_run(tmp_path: Path) -> None:
    shown = page(write(tmp_path, *grown()[:6], finished(3, status="interrupted", test=None)))
    assert "digits, heuristic, seed 7: interrupted" in shown.text
    assert shown.row("test accuracy") == ["not measured"]
    assert shown.row("parameters") == ["12,345"]


def test_run_that_ended_in_nan(tmp_path: Path) -> None:
    last = epoch_event(3, loss=math.nan)
    words = "64 rows of logits and 17 gradient entries were NaN or infinite"
    counts = Event(
        EventType.NONFINITE, 3, {"logits": 64, "gradients": 17, "skipped": 0, "message": words}
    )
    end = finished(3, status="nonfinite", test=None, error="in epoch 3 the loss is not finite")
    shown = page(write(tmp_path, started(), epoch_event(1), epoch_event(2), last, counts, end))
    assert "What ended the run: in epoch 3 the loss is not finite." in shown.text
    assert (
        "In epoch 3: 64 rows of logits and 17 gradient entries were NaN or infinite." in shown.text
    )
    assert shown.row("last validation loss") == ["not finite"]


def test_no_finite_number_at_all(tmp_path: Path) -> None:
    events = []
    for i in (1, 2):
        event = epoch_event(i, grad=False)
        nothing = measures(math.nan, math.nan)
        events.append(
            Event(EventType.EPOCH, i, {**event.data, "train": nothing, "validation": nothing})
        )
    shown = page(write(tmp_path, started(), *events))
    assert shown.pictures == {}
    assert "There is no finite number to draw." in shown.text


@pytest.mark.parametrize("epochs", [0, 1])
def test_few_epochs(tmp_path: Path, epochs: int) -> None:
    slots = (SlotState(slot="early"), SlotState(slot="mid"))
    events = [epoch_event(i + 1, slots) for i in range(epochs)]
    shown = page(write(tmp_path, started(), *events, finished(epochs, status="failed", test=None)))
    assert f"{epochs} of 8 epochs" in shown.text
    assert "seed 7: failed" in shown.text
    assert ("Loss and accuracy over epochs" in shown.pictures) is (epochs > 0)
    assert shown.row("last validation loss") == (["2.5000"] if epochs else ["not measured"])


@pytest.mark.parametrize("content", [None, "", '{"event": "run_sta'])
def test_nothing_reported(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    assert "metrics.jsonl is missing or contains no run." in page(tmp_path).text


def test_missing_directory_and_broken_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("{]\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        write_report(tmp_path)


def test_last_of_several_runs_is_shown(tmp_path: Path) -> None:
    shown = page(write(tmp_path, *fit(test=11.0), *fit(test=22.0)))
    assert shown.row("test accuracy") == ["22.00%"]
    assert "8 of 8 epochs" in shown.text


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


def test_events_of_a_real_run(tmp_path: Path) -> None:
    config = RunConfig(task="synthetic", max_epochs=3, max_batches=2)
    directory = run_directory.create(tmp_path / "run", config)
    hub = TelemetryHub([JsonlSink(directory / run_directory.METRICS)])
    result = run_heuristic_episode(config, hub=hub)
    hub.close()
    shown = page(directory)
    assert shown.row("test accuracy") == [f"{result.test.accuracy:.2f}%"]
    assert shown.row("last validation accuracy") == [f"{result.accuracy:.2f}%"]
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


def test_moves_that_a_rollback_undid_are_not_told(tmp_path: Path) -> None:
    """Fossilized in 5, culled in 6; back to 4 at 7: early's seed is open again, mid's too."""
    events = [event for event in grown() if event.epoch <= 7]
    data = {"to_epoch": 4, "kind": "nonfinite", "number": 1, "slots": [], "message": "rolled back"}
    shown = page(write(tmp_path, *events, Event(EventType.ROLLBACK, 7, data)))
    assert "In epoch 7: rolled back." in shown.text
    assert shown.row("seeds fossilized") == ["0"]
    assert shown.row("seed_1")[3:5] == ["open (TRAINING)", "2"]


def test_epochs_that_were_not_reported_are_gaps(tmp_path: Path) -> None:
    """At the level minimal only those after an anomaly are: the third is still the third."""
    slots = (SlotState(slot="early"), SlotState(slot="mid"))
    shown = page(
        write(
            tmp_path,
            started(),
            *(epoch_event(i, slots) for i in (3, 4)),
            *seated(1, "early", "s", "n", 1),
        )
    )
    assert "4 of 8 epochs" in shown.text
    assert (
        "DORMANT"
        in shown.pictures["Stage, alpha, gradient ratio and contribution of each slot over epochs"]
    )


def test_several_runs_are_compared(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("first", "second", "third")]
    for number, directory in enumerate(directories):
        write(directory, *(grown() if number else fit()), finished(test=90.0 + number))
    path = write_comparison(directories, tmp_path / "comparison.html")
    shown = Page(path.read_text(encoding="utf-8"))
    assert "Comparison of 3 runs" in shown.text
    assert shown.row("") == [str(directory) for directory in directories]
    assert shown.row("test accuracy") == ["91.75%", "91.00%", "92.00%"]
    assert shown.row("seeds fossilized") == ["0", "1", "1"]
    (picture,) = shown.pictures.values()
    for word in ("validation loss (nats)", "validation accuracy (%)", *map(str, directories)):
        assert word in picture
    assert not {"script", "link", "img", "image"} & set(shown.tags)


def test_comparison_escapes_names_and_names_what_holds_no_run(tmp_path: Path) -> None:
    hostile = tmp_path / HOSTILE.replace("/", "-")
    write(hostile, *grown())
    path = write_comparison([hostile, hostile], tmp_path / "page.html")
    shown = Page(path.read_text(encoding="utf-8"))
    assert shown.tags["script"] == 0
    assert str(hostile) in shown.text
    with pytest.raises(ValueError, match=r"no run in .*empty: metrics\.jsonl is missing"):
        write_comparison([hostile, tmp_path / "empty"], tmp_path / "page.html")
