"""Events as JSON and as lines: what a run reports, and the sinks that write it.

Long file: one table of events serves all of these tests.
"""

import io
import math
import os
import re
import signal
import subprocess
import sys
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import ConsoleSink, JsonlSink, describe
from tests.helpers.scripted import STAGE, STARTED, strict


class Colour(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def test_to_json_is_one_flat_record_with_kind_and_epoch() -> None:
    event = Event(
        EventType.EPOCH, 7, {"loss": 0.5, "slots": [{"slot": "early", "alpha": 0.25}], "none": None}
    )
    assert event.to_json() == (
        '{"event": "epoch", "epoch": 7, "loss": 0.5, "slots": [{"slot": "early", "alpha": 0.25}], '
        '"none": null}'
    )


def test_to_json_writes_numbers_that_json_lacks_as_null_at_any_depth() -> None:
    data = {
        "nan": math.nan,
        "deep": {"inf": [1.5, math.inf, (-math.inf, {"again": math.nan})]},
        "fine": [0.0, -2.5],
    }
    assert strict(Event(EventType.EPOCH, 1, data).to_json()) == {
        "event": "epoch",
        "epoch": 1,
        "nan": None,
        "deep": {"inf": [1.5, None, [None, {"again": None}]]},
        "fine": [0.0, -2.5],
    }


def test_to_json_writes_enums_and_keys_that_are_not_text() -> None:
    data = {"colour": Colour.RED, "level": Level.HIGH, "correct": {1: 10, 5: 20}}
    read = strict(Event(EventType.EPOCH, 1, data).to_json())
    assert (read["colour"], read["level"], read["correct"]) == ("red", 3, {"1": 10, "5": 20})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def expected(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expected(item) for item in value]
    return None if value != value or value in (math.inf, -math.inf) else value


@settings(max_examples=100)
@given(value=VALUES)
def test_to_json_is_one_line_that_reads_back(value: Any) -> None:
    line = Event(EventType.NONFINITE, 3, {"value": value}).to_json()
    assert "\n" not in line
    assert strict(line) == {"event": "nonfinite", "epoch": 3, "value": expected(value)}


def test_event_types_are_the_words_in_the_files() -> None:
    assert [kind.value for kind in EventType] == [
        "run_started",
        "epoch",
        "seed_stage",
        "nonfinite",
        "bad_targets",
        "finding",
        "snapshot",
        "rollback",
        "refused",
        "undone",
        "seed_cost",
        "layer_gradients",
        "inexact_resume",
        "run_finished",
    ]


def test_to_json_holds_every_event_of_a_run(
    run_events: list[Event], broken_events: list[Event]
) -> None:
    for event in [*run_events, *broken_events]:
        read = strict(event.to_json())
        assert read["event"] == event.type.value
        assert read["epoch"] == event.epoch
        assert set(read) == {"event", "epoch", *event.data}
    assert strict(broken_events[-1].to_json())["status"] == "nonfinite"


def test_jsonl_sink_has_each_event_on_disk_when_write_returns(
    run_events: list[Event], tmp_path: Path
) -> None:
    """The file is read through another handle and not closed: a killed run loses nothing it
    reported."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    try:
        for count, event in enumerate(run_events, start=1):
            sink.write(event)
            lines = path.read_text(encoding="utf-8").split("\n")
            assert len(lines) == count + 1
            assert lines[-1] == ""
            assert strict(lines[-2])["event"] == event.type.value
    finally:
        sink.close()


def test_jsonl_sink_appends_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2):
        sink = JsonlSink(path)
        sink.write(Event(EventType.EPOCH, epoch, {"word": "ä"}))
        sink.close()
    read = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["epoch"], line["word"]) for line in read] == [(1, "ä"), (2, "ä")]


FINISHED = {
    "status": "completed",
    "fossils": 1,
    "parameters": 1396,
    "seconds": 0.72,
    "test": {"accuracy": 73.046},
    "error": None,
}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Event(EventType.RUN_STARTED, 0, STARTED),
            "heuristic: task digits, seed 42, 75 epochs on cpu (eager), 1009 parameters",
        ),
        (
            Event(
                EventType.EPOCH,
                7,
                {
                    "max_epochs": 75,
                    "train": {"loss": 1.23456, "accuracy": 61.5},
                    "validation": {"loss": 0.5, "accuracy": 8.25},
                    "slots": [
                        {"slot": "early", "stage": "TRAINING"},
                        {"slot": "mid", "stage": "DORMANT"},
                    ],
                },
            ),
            "epoch   7/75  train loss 1.2346 acc 61.50%  validation loss 0.5000 acc  8.25%  "
            "early:training mid:dormant",
        ),
        (
            Event(
                EventType.EPOCH,
                1,
                {
                    "max_epochs": 2,
                    "train": {"loss": math.nan, "accuracy": 10.0},
                    "validation": {"loss": math.inf, "accuracy": 10.0},
                    "slots": [],
                },
            ),
            "epoch   1/2  train loss nan acc 10.00%  validation loss inf acc 10.00%",
        ),
        (
            Event(EventType.SEED_STAGE, 7, STAGE),
            "  early: seed_0 BLENDING -> PROBATIONARY (G3 passed, contribution +3.46 points)",
        ),
        (
            Event(EventType.SEED_STAGE, 7, STAGE | {"contribution": -0.5}),
            "  early: seed_0 BLENDING -> PROBATIONARY (G3 passed, contribution -0.50 points)",
        ),
        (
            Event(
                EventType.SEED_STAGE,
                7,
                STAGE
                | {
                    "contribution": None,
                    "seed_id": None,
                    "from": "EMBARGOED",
                    "stage": "DORMANT",
                    "reason": "over",
                },
            ),
            "  early: slot EMBARGOED -> DORMANT (over)",
        ),
        (
            Event(
                EventType.NONFINITE,
                3,
                {"logits": 12, "gradients": 5, "skipped": 0, "message": "12 rows"},
            ),
            "  epoch 3: 12 rows",
        ),
        (Event(EventType.SNAPSHOT, 5, {"device": "cpu"}), "  the state after epoch 5 is kept"),
        (
            Event(EventType.RUN_FINISHED, 75, FINISHED),
            "completed: 1 fossilized, 1396 parameters, test accuracy 73.05%, 0.7 s",
        ),
        (
            Event(
                EventType.RUN_FINISHED,
                3,
                FINISHED | {"status": "failed", "error": "disk full", "test": None},
            ),
            "failed (disk full): 1 fossilized, 1396 parameters, 0.7 s",
        ),
    ],
)
def test_describe_says_an_event_in_one_line(event: Event, line: str) -> None:
    assert describe(event) == line


LINES = {
    EventType.RUN_STARTED: r"heuristic: task synthetic, seed 42, \d+ epochs on cpu \(\w+\), 1009 "
    r"parameters",
    EventType.EPOCH: r"epoch +\d+/\d+  train loss (\d+\.\d{4}|nan|inf) acc +\d+\.\d\d%  validation "
    r"loss .*  "
    r"early:[a-z]+ mid:[a-z]+ late:[a-z]+",
    EventType.SEED_STAGE: r"  (early|mid): (seed_[01]|slot) [A-Z]+ -> [A-Z]+ \(.+\)",
    EventType.NONFINITE: r"  epoch \d+: \d+ rows of logits and \d+ gradient entries were NaN or "
    r"infinite(, \d .*)?",
    EventType.BAD_TARGETS: r"  epoch 2: 1 rows were left out because their target is outside the "
    r"classes",
    EventType.FINDING: r"  epoch \d+: the loss is not finite: training .*, validation .*",
    EventType.SNAPSHOT: r"  the state after epoch \d+ is kept",
    EventType.ROLLBACK: r"  epoch \d+: rolled back to the state after epoch \d+ \(1 of 3 times\).*",
    EventType.REFUSED: r"  epoch 4: FOSSILIZE was refused: slot 'late' .*legal: GERMINATED",
    EventType.SEED_COST: r"  (early|mid): \w+ costs \d\.\d\d times the multiply-adds of a "
    r"step while it trains(, more than the host)?",
    EventType.LAYER_GRADIENTS: r"  largest gradient of \d+ parameters: host\.[\w.]+ "
    r"(nan|inf|[\d.e+-]+)",
    EventType.RUN_FINISHED: r"(completed|nonfinite \(.*\)): [01] fossilized, \d+ parameters, .*\d "
    r"s",
}


def test_every_kind_of_event_is_emitted_and_described(
    run_events: list[Event], broken_events: list[Event], troubled_events: list[Event]
) -> None:
    events = [*run_events, *broken_events, *troubled_events]
    # An undone seed needs a trial that fails, and an inexact resume a loader without a state:
    # run/test_trial.py and run/test_own_loaders.py have them.
    elsewhere = {EventType.UNDONE, EventType.INEXACT_RESUME}
    assert {event.type for event in events} == set(EventType) - elsewhere
    for event in events:
        assert re.fullmatch(LINES[event.type], describe(event)), describe(event)


def test_run_events_tell_the_life_that_the_controller_asked_for(run_events: list[Event]) -> None:
    """The script seats early at the end of epoch 1, mid at 2, culls mid at 3; the embargo lasts 2
    epochs."""
    assert [event.epoch for event in run_events if event.type is EventType.EPOCH] == list(
        range(1, 13)
    )
    assert (run_events[0].type, run_events[-1].type) == (
        EventType.RUN_STARTED,
        EventType.RUN_FINISHED,
    )
    moves = [
        (e.epoch, e.data["slot"], e.data["stage"])
        for e in run_events
        if e.type is EventType.SEED_STAGE
    ]
    assert [move for move in moves if move[1] == "mid"] == [
        (2, "mid", "GERMINATED"),
        (2, "mid", "TRAINING"),
        (3, "mid", "CULLED"),  # it could not blend: early is on trial, and one seed at a time is
        (3, "mid", "EMBARGOED"),
        (5, "mid", "DORMANT"),
    ]
    assert [move for move in moves if move[1] == "early"][:3] == [
        (1, "early", "GERMINATED"),
        (1, "early", "TRAINING"),
        (2, "early", "BLENDING"),
    ]
    assert [move for move in moves if move[1] == "late"] == []
    refused = {e.epoch: e.data["refused"] for e in run_events if e.type is EventType.EPOCH}
    assert refused[3] is None
    assert refused[4] == "slot 'late' cannot go from DORMANT to FOSSILIZED; legal: GERMINATED"


def test_console_sink_prints_a_line_an_event_and_leaves_the_stream_open(
    run_events: list[Event],
) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    for event in run_events:
        sink.write(event)
    sink.close()
    assert not stream.closed
    assert stream.getvalue() == "".join(describe(event) + "\n" for event in run_events)


def test_console_sink_prints_to_standard_output_by_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ConsoleSink().write(Event(EventType.SNAPSHOT, 3, {}))
    assert capsys.readouterr().out == "  the state after epoch 3 is kept\n"


def test_a_killed_run_keeps_every_event_it_reported(tmp_path: Path) -> None:
    """The process kills itself, as no handler could see, right after its third epoch was
    reported."""
    path = tmp_path / "metrics.jsonl"
    code = f"""
import os, signal
from esper_train import EventType, JsonlSink, RunConfig, TelemetryHub, run_fit

class Killer(JsonlSink):
    def write(self, event):
        super().write(event)
        if event.type is EventType.EPOCH and event.epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)

run_fit(RunConfig(task="synthetic", max_batches=2), hub=TelemetryHub([Killer({str(path)!r})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    read = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["event"], line["epoch"]) for line in read] == [
        ("run_started", 0),
        ("epoch", 1),
        ("epoch", 2),
        ("epoch", 3),
    ]
