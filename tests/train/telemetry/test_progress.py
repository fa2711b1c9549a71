"""Live progress on a terminal, with the events of a real run."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.progress import ProgressSink
from esper_train.telemetry.sinks import describe
from tests.helpers.scripted import STAGE, STARTED


@pytest.fixture
def terminal() -> Iterator[tuple[ProgressSink, io.StringIO]]:
    """A progress sink on a wide console that is no terminal, so that only what stays is written."""
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=False))
    yield sink, stream
    sink.close()


def test_progress_sink_shows_other_events_as_lines_and_the_last_epoch_as_a_bar(
    run_events: list[Event], terminal: tuple[ProgressSink, io.StringIO]
) -> None:
    sink, stream = terminal
    for event in run_events:
        sink.write(event)
    sink.close()
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    above = [describe(event) for event in run_events if event.type is not EventType.EPOCH]
    assert [line for line in lines if line in above] == above
    last = [event for event in run_events if event.type is EventType.EPOCH][-1]
    (bar,) = [line for line in lines if line.startswith("epoch")]
    assert "12/12" in bar
    loss = last.data["validation"]["loss"]
    accuracy = last.data["validation"]["accuracy"]
    assert f"validation loss {loss:.4f} acc {accuracy:.2f}%" in bar
    assert "mid:dormant late:dormant" in bar


def test_progress_sink_shows_markup_in_names_as_it_is(
    terminal: tuple[ProgressSink, io.StringIO],
) -> None:
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


def test_progress_sink_restores_the_cursor_of_a_terminal(run_events: list[Event]) -> None:
    """Escape sequences ?25l and ?25h hide and show it."""
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=True))
    for event in run_events[:3]:
        sink.write(event)
    assert stream.getvalue().rfind("\x1b[?25l") > stream.getvalue().rfind("\x1b[?25h")
    sink.close()
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")


def test_progress_sink_shows_the_number_of_an_epoch_once(run_events: list[Event]) -> None:
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=200, force_terminal=False))
    for event in run_events[
        : 1
        + next(
            i
            for i, event in enumerate(run_events)
            if event.epoch == 7 and event.type is EventType.EPOCH
        )
    ]:
        sink.write(event)
    sink.close()
    (bar,) = [line for line in stream.getvalue().splitlines() if line.startswith("epoch")]
    assert bar.count("7/12") == 1


@pytest.mark.parametrize("width", [60, 80, 100, 110])
@pytest.mark.parametrize("epochs", [75, 100_000])
def test_a_narrow_terminal_keeps_epoch_bar_time_and_validation(width: int, epochs: int) -> None:
    """The words at the end alone are cut off; the line stays one line."""
    stream = io.StringIO()
    sink = ProgressSink(Console(file=stream, width=width, force_terminal=False))
    sink.write(Event(EventType.RUN_STARTED, 0, STARTED | {"max_epochs": epochs}))
    measures = {"loss": 1.23456, "accuracy": 50.0}
    slots = [{"slot": name, "stage": "PROBATIONARY"} for name in ("early", "mid", "late")]
    data = {"max_epochs": epochs, "train": measures, "validation": measures, "slots": slots}
    sink.write(Event(EventType.EPOCH, epochs, data))
    sink.close()
    lines = stream.getvalue().splitlines()
    (bar,) = [line for line in lines if line.startswith("epoch")]
    assert len(bar) <= width
    assert lines[-1] == bar
    assert f" {epochs}/{epochs} " in bar
    assert bar.count("━") >= 3
    assert " 0:00:00 " in bar
    assert " validation loss 1.2346" in bar
    assert " acc 50.00% " in bar or epochs > 75
