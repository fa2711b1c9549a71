"""Bad numbers in whole runs: what each policy does about planted faults."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_train import (
    BadNumbersError,
    Decision,
    EventType,
    NonFiniteLossError,
    Op,
    RunConfig,
    TelemetryHub,
)
from esper_train.run import directory as run_directory
from esper_train.run.build import build_episode
from esper_train.run.episode import Episode
from esper_train.run.report import write_report
from esper_train.telemetry.sinks import JsonlSink
from tests.helpers.bad_numbers import QUICK, config
from tests.helpers.scripted import (
    EASY,
    Planted,
    Recorder,
    Script,
    germinate,
    ignored,
    mislabelled,
    not_a_number,
    run_under,
)

pytestmark = pytest.mark.usefixtures("blank_pictures")


def planted(run: RunConfig, fault: str, *places: tuple[int, int]) -> Episode:
    """A run without slots whose batches at `places` do harm."""
    episode = build_episode(run, slots=())
    armed = [False]

    def arm(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        armed[0] = True
        return inputs, targets

    def spoil(grad: Tensor) -> Tensor:
        factor = {"nan": math.nan, "explosion": 1e6}[fault] if armed[0] else 1.0
        armed[0] = False
        return grad * factor

    if fault == "label":
        episode.train = Planted(episode.train, mislabelled, *places)  # type: ignore[assignment]
    else:
        list(episode.model.parameters())[-2].register_hook(spoil)  # the last layer's weight
        episode.train = Planted(episode.train, arm, *places)  # type: ignore[assignment]
    return episode


def run(episode: Episode, directory: Path) -> tuple[list[dict[str, Any]], str, Exception | None]:
    """Events, the report's page, and what ended the run."""
    run_directory.create(directory, episode.config)
    hub = TelemetryHub([JsonlSink(directory / run_directory.METRICS)])
    ended = None
    try:
        run_under(episode, Script(), hub, mode="fit")
    except (BadNumbersError, IndexError) as error:
        ended = error
    hub.close()
    page = write_report(directory).read_text(encoding="utf-8")
    return run_directory.read_metrics(directory), page, ended


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def finite(episode: Episode) -> bool:
    return all(bool(value.isfinite().all()) for value in episode.model.state_dict().values())


@pytest.mark.parametrize("policy", ["warn", "skip", "stop", "rollback"])
def test_a_nan_gradient(policy: str, tmp_path: Path) -> None:
    """The NaN is planted in batch 2 of epoch 3."""
    episode = planted(config(policy), "nan", (3, 2))
    events, page, ended = run(episode, tmp_path / "run")
    bad = of(events, "nonfinite")[0]
    assert bad["epoch"] == 3
    assert bad["gradients"] > 0
    assert f"In epoch 3: {bad['message']}." in page
    found = [(event["epoch"], event["kind"]) for event in of(events, "finding")]
    status = events[-1]["status"]
    last = of(events, "epoch")[-1]["epoch"]
    if policy == "warn":
        assert (ended, status, last, finite(episode)) == (None, "completed", 6, False)
        assert found == [(epoch, "nonfinite") for epoch in (3, 4, 5, 6)]
    elif policy == "skip":
        assert (ended, status, last, finite(episode), found) == (None, "completed", 6, True, [])
        assert [event["skipped"] for event in of(events, "nonfinite")] == [1]
        assert "1 steps were skipped" in page
    elif policy == "stop":
        assert isinstance(ended, NonFiniteLossError)
        assert (status, last, found) == ("nonfinite", 3, [(3, "nonfinite")])
        assert "What ended the run: in epoch 3 the loss is not finite" in page
    else:
        assert (ended, status, last, finite(episode)) == (None, "completed", 6, True)
        assert found == [(3, "nonfinite")]
        (back,) = of(events, "rollback")
        assert (back["epoch"], back["to_epoch"], back["number"]) == (3, 2, 1)
        assert "In epoch 3: rolled back to the state after epoch 2 (1 of 3 times)." in page
        undone = of(events, "epoch")[2]
        assert (undone["reward"], undone["reward_parts"]) == (-10.0, {"rollback": -10.0})
        assert undone["decision"]["reason"] == "the epoch is undone"


@pytest.mark.parametrize("policy", ["warn", "skip", "stop", "rollback"])
def test_an_exploding_loss(policy: str, tmp_path: Path) -> None:
    """The last layer's gradient is a million times too large in batch 4 of epoch 4: finite, but
    ruinous."""
    episode = planted(config(policy), "explosion", (4, 4))
    events, page, ended = run(episode, tmp_path / "run")
    finding = of(events, "finding")[0]
    assert (finding["epoch"], finding["kind"]) == (4, "divergence")
    assert of(events, "nonfinite") == []
    assert f"In epoch 4: {finding['message']}." in page
    status = events[-1]["status"]
    last = of(events, "epoch")[-1]["epoch"]
    if policy in ("warn", "skip"):
        assert (ended, status, last) == (None, "completed", 6)
        assert of(events, "rollback") == []
    elif policy == "stop":
        assert isinstance(ended, BadNumbersError)
        assert not isinstance(ended, NonFiniteLossError)
        assert (status, last) == ("diverged", 4)
    else:
        assert (ended, status, last) == (None, "completed", 6)
        (back,) = of(events, "rollback")
        assert (back["kind"], back["to_epoch"]) == ("divergence", 2)
        losses = [event["validation"]["loss"] for event in of(events, "epoch")]
        assert losses[3] > 100
        assert max(losses[4:]) < 5


@pytest.mark.parametrize("policy", ["warn", "skip", "stop", "rollback"])
def test_a_bad_label(policy: str, tmp_path: Path) -> None:
    """The first target of batch 2 of epoch 3: but for "stop", its row is left out, as an ignored
    one is."""
    episode = planted(config(policy), "label", (3, 2))
    events, page, ended = run(episode, tmp_path / "run")
    if policy == "stop":
        assert isinstance(ended, IndexError)
        assert events[-1]["status"] == "failed"
        assert f"What ended the run: {events[-1]['error']}." in page
        assert "10" in events[-1]["error"]
        return
    (bad,) = of(events, "bad_targets")
    assert (ended, events[-1]["status"], bad["epoch"], bad["rows"]) == (None, "completed", 3, 1)
    assert f"In epoch 3: {bad['message']}." in page
    assert [event["train"]["valid"] for event in of(events, "epoch")] == [
        128,
        128,
        127,
        128,
        128,
        128,
    ]
    other = build_episode(config(policy), slots=())
    other.train = Planted(other.train, ignored, (3, 2))  # type: ignore[assignment]
    run(other, tmp_path / "other")
    for name, value in episode.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_bad_labels_of_small_types_and_of_held_out_data_are_left_out_too(tmp_path: Path) -> None:
    episode = build_episode(config("warn", max_epochs=1), slots=())
    as_bytes = [
        (inputs, mislabelled(inputs, targets)[1].to(torch.uint8))
        for inputs, targets in episode.validation
    ]
    episode.validation = as_bytes  # type: ignore[assignment]
    events, _, _ = run(episode, tmp_path / "run")
    (bad,) = of(events, "bad_targets")
    assert bad["rows"] == len(as_bytes)
    assert of(events, "epoch")[0]["validation"]["valid"] == 256 - len(as_bytes)


def test_rollback_restores_seeds_whatever_became_of_them(tmp_path: Path) -> None:
    """The state after epoch 6 has `early` and `late` in training and `mid` empty. Then late is
    culled, mid gets a seed, and epoch 9, the last before early would blend, goes bad."""
    growth = replace(EASY, training_min_epochs=8)
    base = config(
        "rollback", max_epochs=16, governor=replace(QUICK, snapshot_epochs=6), growth=growth
    )
    episode = build_episode(base, slots=("early", "mid", "late"))
    recorder = Recorder()
    signals = Script(
        e1=germinate(),
        e5=germinate("late", "norm"),
        e7=Decision(op=Op.CULL, slot="late", reason="test"),
        e8=germinate("mid", "norm"),
        e10=Decision(op=Op.WAIT),
    )
    episode.train = Planted(episode.train, not_a_number, (9, 1))  # type: ignore[assignment]
    result = run_under(episode, signals, TelemetryHub([recorder]))
    (back,) = recorder.of(EventType.ROLLBACK)
    assert (back.epoch, back.data["to_epoch"]) == (9, 6)
    restored = {slot["slot"]: (slot["seed_id"], slot["stage"]) for slot in back.data["slots"]}
    before, after = (next(s for s in signals.seen if s.epoch == epoch).slots for epoch in (6, 10))
    assert restored == {s.slot: (s.seed_id, s.stage.name) for s in before}
    assert restored["late"] == ("seed_1", "TRAINING")
    assert restored["mid"] == (None, "DORMANT")
    # epoch 10 goes on from there: an epoch older, nothing else
    ages = [(s.slot, s.epochs_alive) for s in after]
    assert ages == [(s.slot, s.epochs_alive + (s.seed_id is not None)) for s in before]
    assert "mid from TRAINING to DORMANT" in back.data["message"]
    groups = set(result.model.seed_slots)
    assert groups == {"early", "mid", "late"}
    attached = set(episode.optimizers.parameters())
    assert attached - {"host"} == {s.state.slot for s in result.model.slots if s.seed is not None}
    assert finite(episode)


def test_rollback_keeps_a_fossil_whose_verdict_came_before(tmp_path: Path) -> None:
    """No state is kept during a trial; the verdict of epoch 8 makes the one that epoch 9 returns
    to."""
    base = config(
        "rollback", max_epochs=11, batch_size=64, seed=8, governor=replace(QUICK, snapshot_epochs=7)
    )
    episode = build_episode(base, slots=("early",))
    keep = Decision(op=Op.FOSSILIZE, slot="early")
    episode.train = Planted(episode.train, not_a_number, (9, 1))  # type: ignore[assignment]
    directory = run_directory.create(tmp_path / "run", base)
    recorder = Recorder()
    hub = TelemetryHub([recorder, JsonlSink(directory / run_directory.METRICS)])
    result = run_under(episode, Script(e1=germinate(), e8=keep), hub)
    hub.close()
    assert [epoch for epoch, _, stage in recorder.stages() if stage == "FOSSILIZED"] == [8]
    assert [event.data["to_epoch"] for event in recorder.of(EventType.ROLLBACK)] == [8]
    assert (result.fossils, len(result.contributions)) == (1, 1)
    page = write_report(directory).read_text(encoding="utf-8")
    assert "seeds fossilized</td><td>1</td>" in page


def test_too_many_rollbacks_end_the_run(tmp_path: Path) -> None:
    every = [(epoch, 1) for epoch in range(1, 9)]
    episode = planted(config("rollback", governor=replace(QUICK, max_rollbacks=2)), "nan", (2, 1))
    episode.train = Planted(episode.train, not_a_number, *every)  # type: ignore[assignment]
    events, page, ended = run(episode, tmp_path / "run")
    assert [event["epoch"] for event in of(events, "rollback")] == [1, 2]
    assert isinstance(ended, NonFiniteLossError)
    assert "after 2 rollbacks" in str(ended)
    assert (events[-1]["status"], events[-1]["epoch"]) == ("nonfinite", 3)
    assert "after 2 rollbacks" in page
    assert finite(episode) is False


def test_a_good_run_is_the_same_under_every_policy() -> None:
    """Watching changes nothing: same weights, no finding."""
    weights = []
    for policy in ("warn", "stop", "rollback", "skip"):
        recorder = Recorder()
        episode = build_episode(config(policy), slots=("early",))
        result = run_under(episode, Script(e1=germinate()), TelemetryHub([recorder]))
        weights.append(result.model.state_dict())
        assert recorder.of(EventType.FINDING) == []
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
        assert torch.equal(value, weights[2][name]), name
        assert torch.equal(value, weights[3][name]), name


def test_events_of_a_rollback_are_json(tmp_path: Path) -> None:
    run(planted(config("rollback"), "nan", (3, 2)), tmp_path / "run")
    for line in (tmp_path / "run" / run_directory.METRICS).read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
