"""Events as JSON, as lines and as a progress bar: the hub and its sinks, on events of a real run."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from esper_train.build import build_episode
from esper_train.config import (
    GovernorConfig,
    GradConfig,
    GrowthConfig,
    OptimConfig,
    RunConfig,
    TelemetryConfig,
    TrainConfig,
)
from esper_train.control.policy import Decision, Op
from esper_train.control.signals import Signals
from esper_train.episode import NonFiniteLossError, run_episode, run_heuristic_episode
from esper_train.telemetry.events import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.progress import ProgressSink
from esper_train.telemetry.sinks import ConsoleSink, JsonlSink, describe
from tests.train.scripted import Planted, mislabelled, not_a_number


@dataclass
class Recorder:
    """A sink that keeps what it is given."""

    events: list[Event] = field(default_factory=list)
    closed: int = 0

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


class Scripted:
    """A controller that seats a seed early, which lives on, and one in the middle, which it culls."""

    def reset(self) -> None:
        pass

    def decide(self, signals: Signals) -> Decision:
        seat = {1: ("early", "conv_light"), 2: ("mid", "norm")}.get(signals.epoch)
        if seat:
            return Decision(op=Op.GERMINATE, slot=seat[0], blueprint=seat[1], blend="linear", reason="script")
        if signals.epoch == 3:
            return Decision(op=Op.CULL, slot="mid", reason="script")
        if signals.epoch == 4:
            return Decision(op=Op.FOSSILIZE, slot="late", reason="to be refused")
        return Decision(op=Op.WAIT, reason="script")


@pytest.fixture(scope="module")
def run() -> list[Event]:
    """All events of a run of 12 epochs, in which a seed reaches blending and another is culled."""
    recorder = Recorder()
    config = RunConfig(
        task="synthetic",
        max_epochs=12,
        growth=GrowthConfig(blending_min_epochs=1, blending_improvement=-100.0, blending_epochs=2, embargo_epochs=2),
    )
    run_heuristic_episode(config, policy=Scripted(), hub=TelemetryHub([recorder]))
    return recorder.events


@pytest.fixture(scope="module")
def broken_run() -> list[Event]:
    """All events of a run that ends because its loss is not a number."""
    recorder = Recorder()
    config = RunConfig(task="synthetic", max_epochs=2, max_batches=4, optim=OptimConfig(host_lr=1e30))
    with pytest.raises(NonFiniteLossError):
        run_heuristic_episode(config, hub=TelemetryHub([recorder]))
    return recorder.events


@pytest.fixture(scope="module")
def troubled_run() -> list[Event]:
    """All events, at the level debug, of a run that meets a bad label in epoch 2 and goes back once, in epoch 3."""
    recorder, base = Recorder(), RunConfig(task="synthetic", max_epochs=4, max_batches=4)
    train, telemetry = TrainConfig(on_bad_numbers="rollback"), TelemetryConfig(level="debug")
    config = replace(base, train=train, governor=GovernorConfig(snapshot_epochs=2))
    episode = build_episode(config, slots=("early", "mid", "late"))
    loader = Planted(episode.train, mislabelled, (2, 1))
    episode.train = Planted(loader, not_a_number, (3, 1))  # type: ignore[assignment]
    run_episode(episode, Scripted(), TelemetryHub([recorder], telemetry), mode="heuristic")
    return recorder.events


def strict(line: str) -> Any:
    """JSON as the standard has it: Python's reader would take NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


# events


class Colour(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def test_to_json_is_one_flat_record_with_kind_and_epoch() -> None:
    event = Event(EventType.EPOCH, 7, {"loss": 0.5, "slots": [{"slot": "early", "alpha": 0.25}], "none": None})
    assert event.to_json() == (
        '{"event": "epoch", "epoch": 7, "loss": 0.5, "slots": [{"slot": "early", "alpha": 0.25}], "none": null}'
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
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
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
        "layer_gradients",
        "run_finished",
    ]


def test_to_json_holds_every_event_of_a_run(run: list[Event], broken_run: list[Event]) -> None:
    for event in [*run, *broken_run]:
        read = strict(event.to_json())
        assert read["event"] == event.type.value
        assert read["epoch"] == event.epoch
        assert set(read) == {"event", "epoch", *event.data}
    assert strict(broken_run[-1].to_json())["status"] == "nonfinite"


# sinks


def test_jsonl_sink_has_each_event_on_disk_when_write_returns(run: list[Event], tmp_path: Path) -> None:
    """Read through another handle and without close: a killed run loses nothing it reported."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    try:
        for count, event in enumerate(run, start=1):
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


STARTED = {
    "mode": "heuristic",
    "task": "digits",
    "seed": 42,
    "max_epochs": 75,
    "device": "cpu",
    "backend": "eager",
    "slots": ["early"],
    "host_parameters": 1009,
}
STAGE = {
    "slot": "early",
    "seed_id": "seed_0",
    "from": "BLENDING",
    "stage": "PROBATIONARY",
    "reason": "G3 passed",
    "contribution": 3.456,
}
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
                    "slots": [{"slot": "early", "stage": "TRAINING"}, {"slot": "mid", "stage": "DORMANT"}],
                },
            ),
            "epoch   7/75  train loss 1.2346 acc 61.50%  validation loss 0.5000 acc  8.25%  early:training mid:dormant",
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
                | {"contribution": None, "seed_id": None, "from": "EMBARGOED", "stage": "DORMANT", "reason": "over"},
            ),
            "  early: slot EMBARGOED -> DORMANT (over)",
        ),
        (
            Event(EventType.NONFINITE, 3, {"logits": 12, "gradients": 5, "skipped": 0, "message": "12 rows"}),
            "  epoch 3: 12 rows",
        ),
        (Event(EventType.SNAPSHOT, 5, {"device": "cpu"}), "  the state after epoch 5 is kept"),
        (
            Event(EventType.RUN_FINISHED, 75, FINISHED),
            "completed: 1 fossilized, 1396 parameters, test accuracy 73.05%, 0.7 s",
        ),
        (
            Event(EventType.RUN_FINISHED, 3, FINISHED | {"status": "failed", "error": "disk full", "test": None}),
            "failed (disk full): 1 fossilized, 1396 parameters, 0.7 s",
        ),
    ],
)
def test_describe_says_an_event_in_one_line(event: Event, line: str) -> None:
    assert describe(event) == line


LINES = {
    EventType.RUN_STARTED: r"heuristic: task synthetic, seed 42, \d+ epochs on cpu \(\w+\), 1009 parameters",
    EventType.EPOCH: r"epoch +\d+/\d+  train loss (\d+\.\d{4}|nan|inf) acc +\d+\.\d\d%  validation loss .*  "
    r"early:[a-z]+ mid:[a-z]+ late:[a-z]+",
    EventType.SEED_STAGE: r"  (early|mid): (seed_[01]|slot) [A-Z]+ -> [A-Z]+ \(.+\)",
    EventType.NONFINITE: r"  epoch \d+: \d+ rows of logits and \d+ gradient entries were NaN or infinite(, \d .*)?",
    EventType.BAD_TARGETS: r"  epoch 2: 1 rows were left out because their target is outside the classes",
    EventType.FINDING: r"  epoch \d+: the loss is not finite: training .*, validation .*",
    EventType.SNAPSHOT: r"  the state after epoch \d+ is kept",
    EventType.ROLLBACK: r"  epoch \d+: rolled back to the state after epoch \d+ \(1 of 3 times\).*",
    EventType.LAYER_GRADIENTS: r"  largest gradient of \d+ parameters: host\.[\w.]+ (nan|inf|[\d.e+-]+)",
    EventType.RUN_FINISHED: r"(completed|nonfinite \(.*\)): [01] fossilized, \d+ parameters, .*\d s",
}


def test_every_kind_of_event_is_emitted_and_described(
    run: list[Event], broken_run: list[Event], troubled_run: list[Event]
) -> None:
    events = [*run, *broken_run, *troubled_run]
    assert {event.type for event in events} == set(EventType)
    for event in events:
        assert re.fullmatch(LINES[event.type], describe(event)), describe(event)


def test_run_events_tell_the_life_that_the_controller_asked_for(run: list[Event]) -> None:
    """The script seats early at the end of epoch 1, mid at 2, culls mid at 3; the embargo lasts 2 epochs."""
    assert [event.epoch for event in run if event.type is EventType.EPOCH] == list(range(1, 13))
    assert (run[0].type, run[-1].type) == (EventType.RUN_STARTED, EventType.RUN_FINISHED)
    moves = [(e.epoch, e.data["slot"], e.data["stage"]) for e in run if e.type is EventType.SEED_STAGE]
    assert [move for move in moves if move[1] == "mid"] == [
        (2, "mid", "GERMINATED"),
        (2, "mid", "TRAINING"),
        (3, "mid", "BLENDING"),  # the slot moves before the controller decides
        (3, "mid", "CULLED"),
        (3, "mid", "EMBARGOED"),
        (5, "mid", "DORMANT"),
    ]
    assert [move for move in moves if move[1] == "early"][:3] == [
        (1, "early", "GERMINATED"),
        (1, "early", "TRAINING"),
        (2, "early", "BLENDING"),
    ]
    assert [move for move in moves if move[1] == "late"] == []
    refused = {e.epoch: e.data["refused"] for e in run if e.type is EventType.EPOCH}
    assert refused[3] is None
    assert refused[4] == "slot 'late' cannot go from DORMANT to FOSSILIZED; legal: GERMINATED"


def test_console_sink_prints_a_line_an_event_and_leaves_the_stream_open(run: list[Event]) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    for event in run:
        sink.write(event)
    sink.close()
    assert not stream.closed
    assert stream.getvalue() == "".join(describe(event) + "\n" for event in run)


def test_console_sink_prints_to_standard_output_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink().write(Event(EventType.SNAPSHOT, 3, {}))
    assert capsys.readouterr().out == "  the state after epoch 3 is kept\n"


# the hub


class Failing(Recorder):
    """A sink that fails from its second event on."""

    def write(self, event: Event) -> None:
        super().write(event)
        if len(self.events) > 1:
            raise OSError("disk full")


def some_events(count: int = 4) -> list[Event]:
    return [Event(EventType.NONFINITE, i, {"logits": i, "gradients": 0}) for i in range(count)]


def test_emit_gives_every_event_to_every_sink_in_order() -> None:
    first, second = Recorder(), Recorder()
    hub = TelemetryHub([first, second])
    for event in some_events():
        hub.emit(event)
    assert first.events == second.events == some_events()


def test_emit_reports_a_failing_sink_once_and_goes_on_with_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, failing, after = Recorder(), Failing(), Recorder()
    hub = TelemetryHub([before, failing, after])
    for event in some_events():
        hub.emit(event)
    assert before.events == after.events == some_events()
    assert failing.events == some_events(2)
    captured = capsys.readouterr()
    assert captured.err == "telemetry: Failing failed and is left out: disk full\n"
    assert captured.out == ""


def test_emit_reports_an_event_that_json_cannot_hold_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder, jsonl = Recorder(), JsonlSink(tmp_path / "metrics.jsonl")
    hub = TelemetryHub([jsonl, recorder])
    hub.emit(Event(EventType.EPOCH, 1, {"good": 1}))
    hub.emit(Event(EventType.EPOCH, 2, {"bad": object()}))
    jsonl.close()
    assert len(recorder.events) == 2
    assert "JsonlSink failed and is left out: " in capsys.readouterr().err
    assert [strict(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_emit_lets_an_interrupt_through() -> None:
    class Interrupted(Recorder):
        def write(self, event: Event) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TelemetryHub([Interrupted()]).emit(some_events()[0])


@pytest.mark.parametrize(("level", "count"), [("off", 0), ("normal", 4)])
def test_emit_obeys_the_level(level: Any, count: int) -> None:
    recorder = Recorder()
    hub = TelemetryHub([recorder], TelemetryConfig(level=level))
    for event in some_events():
        hub.emit(event)
    assert len(recorder.events) == count


def test_emit_without_sinks_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    hub = TelemetryHub()
    hub.emit(some_events()[0])
    hub.close()
    assert capsys.readouterr() == ("", "")


def test_close_closes_every_sink_once() -> None:
    sinks = [Recorder(), Recorder()]
    TelemetryHub(sinks).close()
    assert [sink.closed for sink in sinks] == [1, 1]


def test_hubs_do_not_share_sinks() -> None:
    first, second = Recorder(), Recorder()
    TelemetryHub([first]).emit(some_events()[0])
    TelemetryHub([second]).emit(some_events()[1])
    assert first.events == some_events(1)
    assert second.events == [some_events()[1]]


# progress


@pytest.fixture
def terminal() -> Iterator[tuple[ProgressSink, io.StringIO]]:
    """A progress sink on a wide console that is no terminal, so that only what stays is written."""
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=False))
    yield sink, stream
    sink.close()


def test_progress_sink_shows_other_events_as_lines_and_the_last_epoch_as_a_bar(
    run: list[Event], terminal: tuple[ProgressSink, io.StringIO]
) -> None:
    sink, stream = terminal
    for event in run:
        sink.write(event)
    sink.close()
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    above = [describe(event) for event in run if event.type is not EventType.EPOCH]
    assert [line for line in lines if line in above] == above
    last = [event for event in run if event.type is EventType.EPOCH][-1]
    (bar,) = [line for line in lines if line.startswith("epoch")]
    assert "12/12" in bar
    loss, accuracy = last.data["validation"]["loss"], last.data["validation"]["accuracy"]
    assert f"validation loss {loss:.4f} acc {accuracy:.2f}%" in bar
    assert "mid:dormant late:dormant" in bar


def test_progress_sink_shows_markup_in_names_as_it_is(terminal: tuple[ProgressSink, io.StringIO]) -> None:
    sink, stream = terminal
    sink.write(Event(EventType.RUN_STARTED, 0, STARTED | {"task": "[red]mine[/red]"}))
    sink.write(Event(EventType.SEED_STAGE, 1, STAGE | {"reason": "[/nonsense]"}))
    measures = {"loss": 1.0, "accuracy": 50.0}
    slots = [{"slot": "[bold]x", "stage": "TRAINING"}]
    data = {"max_epochs": 75, "train": measures, "validation": measures, "slots": slots}
    sink.write(Event(EventType.EPOCH, 1, data))
    sink.close()
    shown = stream.getvalue()
    assert "task [red]mine[/red], seed 42" in shown
    assert "([/nonsense], contribution +3.46 points)" in shown
    assert "[bold]x:training" in shown


def test_progress_sink_closes_before_any_event(terminal: tuple[ProgressSink, io.StringIO]) -> None:
    sink, _ = terminal
    sink.close()
    sink.close()


def test_progress_sink_restores_the_cursor_of_a_terminal(run: list[Event]) -> None:
    """Escape sequences ?25l and ?25h hide and show it."""
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=True))
    for event in run[:3]:
        sink.write(event)
    assert stream.getvalue().rfind("\x1b[?25l") > stream.getvalue().rfind("\x1b[?25h")
    sink.close()
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")


def test_progress_sink_shows_the_number_of_an_epoch_once(run: list[Event]) -> None:
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=False))
    for event in run[
        : 1 + next(i for i, event in enumerate(run) if event.epoch == 7 and event.type is EventType.EPOCH)
    ]:
        sink.write(event)
    sink.close()
    (bar,) = [line for line in stream.getvalue().splitlines() if line.startswith("epoch")]
    assert bar.count("7/12") == 1


class Broken(Recorder):
    """Fails at whatever it is asked, and counts how often it was closed."""

    def write(self, event: Event) -> None:
        raise OSError("no space left")

    def close(self) -> None:
        super().close()
        raise OSError("no space left")


def test_a_sink_that_is_left_out_is_closed() -> None:
    broken = Broken()
    hub = TelemetryHub([broken])
    hub.emit(some_events()[0])
    assert broken.closed == 1
    hub.close()
    assert broken.closed == 1


def test_close_goes_on_past_a_sink_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    other = Recorder()
    TelemetryHub([Broken(), other]).close()
    assert other.closed == 1
    assert capsys.readouterr().err.count("Broken failed") == 1


# what a level takes, and that none of it changes the training


@pytest.mark.parametrize("lifecycle_only", [False, True])
@pytest.mark.parametrize("level", ["off", "minimal", "normal", "debug"])
def test_no_level_changes_the_training(level: Any, lifecycle_only: bool) -> None:
    """Germination, a cull, exploding gradients and the escalation after them: the weights are those of silence."""
    growth = GrowthConfig(blending_min_epochs=1, blending_improvement=-100.0, blending_epochs=2, embargo_epochs=2)
    train = TrainConfig(grad=GradConfig(exploding=0.5))
    config = RunConfig(task="synthetic", max_epochs=5, max_batches=4, growth=growth, train=train)
    recorder = Recorder()
    telemetry = TelemetryConfig(level=level, lifecycle_only=lifecycle_only, escalation_epochs=2)
    watched = run_heuristic_episode(config, policy=Scripted(), hub=TelemetryHub([recorder], telemetry))
    silent = run_heuristic_episode(config, policy=Scripted())
    for name, value in silent.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    kinds = {event.type for event in recorder.events}
    lives = {EventType.RUN_STARTED, EventType.SEED_STAGE, EventType.RUN_FINISHED}
    # exploding gradients escalate every level but off
    everything = lives | {EventType.EPOCH, EventType.LAYER_GRADIENTS}
    assert kinds == (set() if level == "off" else lives if lifecycle_only else everything)


def test_a_level_takes_its_kinds_until_it_is_escalated() -> None:
    taken = {"minimal": set(EventType) - {EventType.EPOCH, EventType.SNAPSHOT, EventType.LAYER_GRADIENTS}}
    taken |= {"off": set(), "normal": taken["minimal"] | {EventType.EPOCH}, "debug": set(EventType)}
    for level, kinds in taken.items():
        hub = TelemetryHub([Recorder()], TelemetryConfig(level=level, escalation_epochs=2))  # type: ignore[arg-type]
        assert {kind for kind in EventType if hub.collects(kind)} == kinds
        hub.escalate()
        for left in (2, 1, 0):
            escalated = set(EventType) if left and level != "off" else kinds
            assert {kind for kind in EventType if hub.collects(kind)} == escalated
            hub.tick()


def test_bad_numbers_escalate_to_debug(broken_run: list[Event]) -> None:
    assert EventType.LAYER_GRADIENTS in {event.type for event in broken_run}


def test_a_killed_run_keeps_every_event_it_reported(tmp_path: Path) -> None:
    """The process kills itself, as no handler could see, right after its third epoch was reported."""
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
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    read = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["event"], line["epoch"]) for line in read] == [
        ("run_started", 0),
        ("epoch", 1),
        ("epoch", 2),
        ("epoch", 3),
    ]
