"""The hub: every event to every sink, the events of each level, and no effect on training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train.config import RunConfig
from esper_train.run.start import run_heuristic_episode
from esper_train.telemetry.config import TelemetryConfig
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import ConsoleSink, JsonlSink
from esper_train.train.config import GradConfig, TrainConfig
from tests.helpers.scripted import EASY, Recorder, a_life_and_a_cull, strict


class Failing(Recorder):
    """A sink that fails from its second event on."""

    def write(self, event: Event) -> None:
        super().write(event)
        if len(self.events) > 1:
            raise OSError("disk full")


def some_events(count: int = 4) -> list[Event]:
    return [Event(EventType.NONFINITE, i, {"logits": i, "gradients": 0}) for i in range(count)]


def test_emit_gives_every_event_to_every_sink_in_order() -> None:
    first = Recorder()
    second = Recorder()
    hub = TelemetryHub([first, second])
    for event in some_events():
        hub.emit(event)
    assert first.events == second.events == some_events()


def test_emit_reports_a_failing_sink_once_and_goes_on_with_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = Recorder()
    failing = Failing()
    after = Recorder()
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
    recorder = Recorder()
    jsonl = JsonlSink(tmp_path / "metrics.jsonl")
    hub = TelemetryHub([jsonl, recorder])
    hub.emit(Event(EventType.EPOCH, 1, {"good": 1}))
    hub.emit(Event(EventType.EPOCH, 2, {"bad": object()}))
    jsonl.close()
    assert len(recorder.events) == 2
    assert "JsonlSink failed and is left out: " in capsys.readouterr().err
    assert [
        strict(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1]


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
    first = Recorder()
    second = Recorder()
    TelemetryHub([first]).emit(some_events()[0])
    TelemetryHub([second]).emit(some_events()[1])
    assert first.events == some_events(1)
    assert second.events == [some_events()[1]]


class Broken(Recorder):
    """A sink that fails at every call, and counts how often it was closed."""

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


@pytest.mark.parametrize("lifecycle_only", [False, True])
@pytest.mark.parametrize("level", ["off", "minimal", "normal", "debug"])
def test_no_level_changes_the_training(level: Any, lifecycle_only: bool) -> None:
    """The run has a germination, a cull, exploding gradients and the escalation after them: its
    weights are those of silence."""
    growth = replace(EASY, training_min_epochs=1, blending_epochs=2, embargo_epochs=2)
    train = TrainConfig(grad=GradConfig(exploding=0.5))
    config = RunConfig(task="synthetic", max_epochs=5, max_batches=4, growth=growth, train=train)
    recorder = Recorder()
    telemetry = TelemetryConfig(level=level, lifecycle_only=lifecycle_only, escalation_epochs=2)
    watched = run_heuristic_episode(
        config, policy=a_life_and_a_cull(), hub=TelemetryHub([recorder], telemetry)
    )
    silent = run_heuristic_episode(config, policy=a_life_and_a_cull())
    for name, value in silent.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    kinds = {event.type for event in recorder.events}
    ends = {EventType.RUN_STARTED, EventType.RUN_FINISHED}
    lives = ends | {EventType.SEED_STAGE, EventType.REFUSED}
    # exploding gradients escalate every level but off
    everything = lives | {EventType.EPOCH, EventType.SEED_COST, EventType.LAYER_GRADIENTS}
    assert kinds == (lives if lifecycle_only else set() if level == "off" else everything)


def test_a_level_takes_its_kinds_until_it_is_escalated() -> None:
    taken = {
        "off": set(),
        "normal": set(EventType) - {EventType.SNAPSHOT, EventType.LAYER_GRADIENTS},
        "debug": set(EventType),
    }
    taken["minimal"] = taken["normal"] - {EventType.EPOCH, EventType.SEED_COST}
    for level, kinds in taken.items():
        hub = TelemetryHub([Recorder()], TelemetryConfig(level=level, escalation_epochs=2))  # type: ignore[arg-type]
        assert {kind for kind in EventType if hub.collects(kind)} == kinds
        hub.escalate()
        for left in (2, 1, 0):
            escalated = set(EventType) if left and level != "off" else kinds
            assert {kind for kind in EventType if hub.collects(kind)} == escalated
            hub.tick()


def test_an_escalation_does_not_shorten_one_under_way() -> None:
    hub = TelemetryHub([Recorder()], TelemetryConfig(escalation_epochs=2))
    hub.escalate(5)
    hub.escalate()
    assert hub.state_dict() == {"_escalated_epochs": 5}


def test_bad_numbers_escalate_to_debug(broken_events: list[Event]) -> None:
    assert EventType.LAYER_GRADIENTS in {event.type for event in broken_events}


def test_a_sink_in_place_of_a_list_of_sinks_is_refused() -> None:
    with pytest.raises(TypeError, match=r"sinks must be a list of sinks.*pass \[sink\]"):
        TelemetryHub(ConsoleSink())  # type: ignore[arg-type]
