"""Reports of runs that measured little, ended early, or reported nothing at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from esper_train.morph.lifecycle import SlotState
from esper_train.run.report import write_report
from esper_train.telemetry.event import Event, EventType
from tests.helpers.reports import (
    epoch_event,
    finished,
    fit,
    grown,
    health,
    measures,
    page,
    seated,
    started,
    write,
)

pytest.importorskip("matplotlib")


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


def test_moves_that_a_rollback_undid_are_not_told(tmp_path: Path) -> None:
    """The seed in early is fossilized in 5 and that in mid culled in 6; the rollback at 7 returns
    to 4, so early's seed is open again, and mid's too."""
    events = [event for event in grown() if event.epoch <= 7]
    data = {"to_epoch": 4, "kind": "nonfinite", "number": 1, "slots": [], "message": "rolled back"}
    shown = page(write(tmp_path, *events, Event(EventType.ROLLBACK, 7, data)))
    assert "In epoch 7: rolled back." in shown.text
    assert shown.row("seeds fossilized") == ["0"]
    assert shown.row("seed_1")[3:5] == ["open (TRAINING)", "2"]


def test_epochs_that_were_not_reported_are_gaps(tmp_path: Path) -> None:
    """At the level minimal only the epochs after an anomaly are reported: the third is still the
    third."""
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
