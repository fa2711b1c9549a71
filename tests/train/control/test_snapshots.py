"""The state that a rollback returns to: all of it, on its device, and only while it is good."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_train import (
    Decision,
    EventType,
    GovernorConfig,
    Op,
    SeedStage,
    TelemetryConfig,
    TelemetryHub,
    TrainConfig,
    train_one_epoch,
)
from esper_train.control.governor import Finding, weights_are_finite
from esper_train.run.build import build_episode
from esper_train.run.episode import Episode
from tests.helpers.bad_numbers import SHORT, config
from tests.helpers.scripted import Recorder, Script, germinate, run_under


def owned(episode: Episode) -> Any:
    return episode.model, episode.optimizers, episode.tracker


def bits(episode_parts: Any) -> list[Tensor]:
    model, optimizers, _ = episode_parts
    states = [state for o in optimizers.present() for state in o.state_dict()["state"].values()]
    return [
        *model.state_dict().values(),
        *(v for state in states for v in state.values() if isinstance(v, Tensor)),
    ]


def some_epochs(parts: Any, batches: Any) -> None:
    for _ in range(2):
        train_one_epoch(parts[0], batches, parts[1], TrainConfig(), task_type="classification")


@pytest.fixture
def grown() -> Episode:
    """A trained network with a seed that blends in, a fossil, and momentum."""
    episode = build_episode(replace(SHORT, max_epochs=9), slots=("early", "mid"))
    policy = Script(
        e1=germinate(), e4=germinate("mid", "norm"), e8=Decision(op=Op.FOSSILIZE, slot="early")
    )
    run_under(episode, policy)
    assert [s.state.stage for s in episode.model.slots] == [
        SeedStage.FOSSILIZED,
        SeedStage.BLENDING,
    ]
    return episode


def test_a_snapshot_brings_everything_back(grown: Episode) -> None:
    batches = list(grown.validation)
    taken = grown.snapshot()
    states = [s.state for s in grown.model.slots]
    tracked = grown.tracker.state_dict()
    expected = [value.clone() for value in bits(owned(grown))]
    some_epochs(owned(grown), batches)
    moved = [value.clone() for value in bits(owned(grown))]
    assert not all(torch.equal(a, b) for a, b in zip(expected, moved, strict=True))
    grown.model.cull_seed(slot="mid")
    grown.optimizers.detach("mid")
    grown.tracker.reset()
    grown.go_back(taken)
    assert all(torch.equal(a, b) for a, b in zip(expected, bits(owned(grown)), strict=True))
    assert [s.state for s in grown.model.slots] == states
    assert grown.tracker.state_dict() == tracked
    # the same again from there: the first time left nothing behind
    some_epochs(owned(grown), batches)
    assert all(torch.equal(a, b) for a, b in zip(moved, bits(owned(grown)), strict=True))
    grown.go_back(taken)  # it was left alone
    assert all(torch.equal(a, b) for a, b in zip(expected, bits(owned(grown)), strict=True))


def test_restored_optimizers_hold_the_restored_models_parameters(grown: Episode) -> None:
    before = list(grown.model.parameters())
    attached = list(grown.optimizers.parameters())
    hosts = set(map(id, grown.model.get_host_parameters()))
    grown.go_back(grown.snapshot())
    groups = {
        name: {id(p) for p in members} for name, members in grown.optimizers.parameters().items()
    }
    assert list(groups) == attached
    assert groups["host"] == hosts
    assert groups["host"] == {id(p) for p in grown.model.get_host_parameters()}
    for slot in ("early", "mid"):
        assert groups[slot] == {id(p) for p in grown.model.get_seed_parameters(slot)}
        assert not groups[slot] & {id(p) for p in before}


def test_a_snapshot_is_kept_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is `meta`, which has no memory, so that what is really moved shows without an
    accelerator."""
    monkeypatch.setattr("esper_train.run.episode.resolve_device", torch.device)
    monkeypatch.setattr("esper_train.run.build.resolve_device", torch.device)
    episode = build_episode(
        replace(SHORT, governor=GovernorConfig(snapshot_device="meta")), slots=("early",)
    )
    some_epochs(owned(episode), list(episode.validation))
    taken = episode.snapshot()
    states = [state for group in taken["optimizers"].values() for state in group["state"].values()]
    kept = [*taken["model"].values(), *(value for state in states for value in state.values())]
    assert len(kept) == len(bits(owned(episode)))
    assert {value.device.type for value in kept} == {"meta"}
    assert {value.device.type for value in bits(owned(episode))} == {"cpu"}


def test_weights_are_finite_looks_at_seeds_that_show_in_no_loss() -> None:
    episode = build_episode(SHORT, slots=("early",))
    episode.model.germinate_seed("conv_light", "seed", slot="early")
    assert weights_are_finite(episode.model.state_dict().values())
    seed = next(iter(episode.model.get_seed_parameters()))
    with torch.no_grad():
        seed.view(-1)[0] = math.inf
    assert not weights_are_finite(episode.model.state_dict().values())


def test_no_snapshot_is_taken_of_bad_weights() -> None:
    """A seed in training that diverged shows in no loss, but must not become the state to return
    to."""
    recorder = Recorder()
    episode = build_episode(config("rollback", max_epochs=6), slots=("early",))

    class Saboteur(Script):
        def decide(self, signals: Any) -> Decision:
            if signals.epoch == 3:
                with torch.no_grad():
                    next(iter(episode.model.get_seed_parameters())).fill_(math.nan)
            return super().decide(signals)

    hub = TelemetryHub([recorder], TelemetryConfig(level="debug"))
    run_under(episode, Saboteur(e1=germinate()), hub)
    assert [event.epoch for event in recorder.of(EventType.SNAPSHOT)] == [0, 2]


def test_no_snapshot_is_taken_while_the_loss_is_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is not over yet, but what is kept then would be the state that the finding is
    about."""
    recorder = Recorder()
    watch = GovernorConfig(patience=3, snapshot_epochs=2)
    episode = build_episode(config("rollback", max_epochs=6, governor=watch), slots=("early",))
    bad = Finding(kind="divergence", message="made up")
    losses = iter([None, None, bad, bad, bad, None])  # epoch 4 is one for a snapshot
    monkeypatch.setattr(episode.governor, "_compare", lambda loss: next(losses))
    run_under(episode, Script(), TelemetryHub([recorder], TelemetryConfig(level="debug")))
    assert [event.epoch for event in recorder.of(EventType.SNAPSHOT)] == [0, 2, 6]
    assert [(e.epoch, e.data["to_epoch"]) for e in recorder.of(EventType.ROLLBACK)] == [(5, 2)]
