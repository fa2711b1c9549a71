"""A seed that fails after blending began leaves the network as it was, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_train import (
    BlueprintRegistry,
    Decision,
    EventType,
    GovernorConfig,
    Op,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SeedStage,
    TelemetryHub,
    TrainConfig,
    default_registry,
    evaluate,
)
from esper_train.base.state import copied
from esper_train.morph.blueprints import Blueprint
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Checkpoints, load, restore, saved
from esper_train.run.episode import Episode
from esper_train.run.epoch import Epoch
from tests.helpers.scripted import EASY, Recorder, Script, germinate
from tests.helpers.taped import assert_same

GROWTH = replace(EASY, blending_epochs=3, harm=3.0, undo_wait=2, undo_wait_ceiling=5)
SCHEDULED = OptimConfig(host_lr=0.05, schedule=ScheduleConfig(kind="cosine"))
CONFIG = RunConfig(
    task="synthetic", max_epochs=30, max_batches=4, batch_size=32, growth=GROWTH, optim=SCHEDULED
)


class TurnsBad(nn.Module):
    """A seed that is harmless in TRAINING, while it still learns. Once blending has begun, it ruins
    the network."""

    def __init__(self, channels: int, value: float, after: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.value = value
        self.after = after
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        bad = self.steps > self.after
        return x + self.scale * x + torch.where(bad, self.value, 0.0) * x.detach().sign().roll(1, 0)


def planted(value: float, after: int = 13) -> BlueprintRegistry:
    """The default blueprints and one whose seeds turn bad after that many batches. With 4 batches
    per epoch, a seed that germinates after epoch 1 has learned for 12 when blending begins."""
    registry = default_registry()
    registry.register(Blueprint("bad", "cnn", lambda channels: TurnsBad(channels, value, after)))
    return registry


HARMFUL = 1e3
NAN = float("nan")


def prepared(config: RunConfig = CONFIG, value: float = HARMFUL, after: int = 13) -> Episode:
    episode = build_episode(config, slots=("early", "mid"), registry=planted(value, after))
    episode.mode = "heuristic"
    return episode


def network(episode: Episode) -> dict[str, Any]:
    """Weights, running statistics and momentum of the host."""
    momentum = episode.optimizers.state_dict()["host"]["state"]
    return copied({"host": episode.model.host.state_dict(), "momentum": momentum})


def go(episode: Episode, script: Script, until: int) -> dict[int, dict[str, Any]]:
    """Run up to an epoch; the network at the end of each, and the random numbers."""
    states = {}
    with episode.random.active():
        for number in range(episode.epoch + 1, until + 1):
            epoch = Epoch(episode, number)
            signals = epoch.observe(epoch.launch().read())
            if signals is not None:
                epoch.apply(script.decide(signals))
            episode.epoch = number
            states[number] = network(episode) | {"random": torch.get_rng_state()}
    return states


def watched(episode: Episode) -> Recorder:
    recorder = Recorder()
    episode.hub = TelemetryHub([recorder])
    return recorder


@pytest.mark.parametrize("policy", ["warn", "skip", "stop", "rollback"])
@pytest.mark.parametrize(("value", "epochs"), [(HARMFUL, 3), (NAN, 1)], ids=["harmful", "nan"])
def test_a_planted_seed_never_survives_and_leaves_the_network_as_it_was(
    value: float, epochs: int, policy: Any
) -> None:
    """It passes G2, blending begins after epoch 4, and at once it turns."""
    config = replace(
        CONFIG, train=TrainConfig(on_bad_numbers=policy), governor=GovernorConfig(snapshot_epochs=1)
    )
    episode = prepared(config, value)
    recorder = watched(episode)
    if policy == "skip" and value != HARMFUL:
        epochs = 3 + GROWTH.probation_timeout  # every step is skipped, so the losses stay fine
    states = go(episode, Script(e1=germinate("early", "bad")), 5 + epochs)
    assert recorder.stages()[2] == (4, "early", "BLENDING")
    (undone,) = recorder.of(EventType.UNDONE)
    assert (undone.epoch, undone.data["to_epoch"], undone.data["epochs"]) == (4 + epochs, 4, epochs)
    assert not [stage for stage in recorder.stages() if stage[2] == "FOSSILIZED"]
    end = undone.epoch
    for part in ("host", "momentum"):
        assert_same(states[end][part], states[4][part])
    if value == HARMFUL:  # every policy but "warn" treats NaN in its own way
        assert not torch.equal(
            states[end - 1]["host"]["head.2.weight"], states[4]["host"]["head.2.weight"]
        )
    assert all(bool(value.isfinite().all()) for value in states[end + 1]["host"].values())
    assert episode.trial.slot is None
    assert (episode.trial.undone, episode.trial.epochs) == (1, epochs)
    if episode.good is not None:
        assert SeedStage.BLENDING.name not in [
            slot["stage"] for slot in episode.good["episode"]["slots"]
        ]


def test_schedules_scale_order_and_epochs_go_on() -> None:
    """The network alone goes back: learning rates and the order of the data are those of a run that
    never grew."""
    episode = prepared()
    bare = prepared()
    go(episode, Script(e1=germinate("early", "bad")), 7)
    go(bare, Script(), 7)
    assert episode.trial.undone == 1
    assert episode.epoch == 7
    rates = [e.optimizers.present()[0].param_groups[0]["lr"] for e in (episode, bare)]
    assert rates[0] == rates[1] < SCHEDULED.host_lr
    schedules = [
        e.optimizers.state_dict()["host"]["schedule"]["last_epoch"] for e in (episode, bare)
    ]
    assert schedules[0] == schedules[1]
    orders = [e.random.state_dict()["order"] for e in (episode, bare)]
    assert torch.equal(orders[0], orders[1])


def test_a_cull_by_the_controller_is_undone_too() -> None:
    episode = prepared(after=10**9)
    script = Script(
        e1=germinate("early", "bad"), e6=Decision(op=Op.CULL, slot="early", reason="asked")
    )
    states = go(episode, script, 6)
    assert_same(states[6]["host"], states[4]["host"])
    assert_same(states[6]["momentum"], states[4]["momentum"])
    assert not torch.equal(states[5]["host"]["head.2.weight"], states[4]["host"]["head.2.weight"])


def test_a_run_does_not_give_the_network_before_a_trial_for_the_loss_of_its_last_epoch() -> None:
    """The seed helps, so the loss is lowest in the epoch after which a controller undoes it."""
    episode = prepared(after=10**9)
    recorder = watched(episode)
    script = Script(
        e1=germinate("early", "bad"), e8=Decision(op=Op.CULL, slot="early", reason="asked")
    )
    go(episode, script, 8)
    losses = [event.data["validation"]["loss"] for event in recorder.of(EventType.EPOCH)]
    assert min(losses) == losses[-1]
    assert episode.trial.undone == 1
    assert episode.kept.epoch <= 3
    episode.kept.give(episode.model)
    found = evaluate(episode.model, episode.validation, CONFIG.train, task_type="classification")
    assert found.loss == pytest.approx(episode.kept.loss)


def test_a_cull_in_training_undoes_nothing() -> None:
    episode = prepared(after=10**9)
    script = Script(
        e1=germinate("early", "bad"), e3=Decision(op=Op.CULL, slot="early", reason="asked")
    )
    states = go(episode, script, 5)
    bare = go(prepared(), Script(), 5)
    assert_same(states, bare)
    assert episode.trial.undone == 0


def test_another_seed_that_was_there_goes_back_and_a_later_one_stays() -> None:
    episode = build_episode(CONFIG, slots=("early", "mid", "late"), registry=planted(HARMFUL))
    growth_of = {
        "e1": germinate("early", "bad"),
        "e2": germinate("mid", "conv_light"),
        "e5": germinate("late", "norm"),
    }
    go(episode, Script(**growth_of), 4)
    seed = episode.model.slot("mid").seed
    assert seed is not None
    before = copied(seed.state_dict())
    go(episode, Script(**growth_of), 6)
    late = episode.model.slot("late").seed
    assert episode.model.slot("mid").state.stage is SeedStage.TRAINING, (
        "one seed at a time is on trial"
    )
    go(episode, Script(**growth_of), 7)
    assert episode.trial.undone == 1
    assert_same(seed.state_dict(), before)
    state = episode.model.slot("mid").state
    assert (state.stage, state.epochs_in_stage, state.accuracies) == (SeedStage.TRAINING, 0, ())
    assert episode.model.slot("late").seed is late


def test_waits_double_up_to_a_ceiling_and_refuse_germination() -> None:
    episode = prepared()
    recorder = watched(episode)
    asks = {f"e{number}": germinate("early", "bad") for number in range(1, 60)}
    config = replace(CONFIG, max_epochs=60, growth=replace(GROWTH, embargo_epochs=0))
    episode = build_episode(config, slots=("early",), registry=planted(HARMFUL))
    episode.hub = TelemetryHub([recorder])
    go(episode, Script(**asks), 40)
    undone = recorder.of(EventType.UNDONE)
    assert [event.data["wait"] for event in undone][:4] == [2, 4, 5, 5]
    born = [epoch for epoch, _, stage in recorder.stages() if stage == "GERMINATED"]
    for event, next_birth in zip(undone, born[1:], strict=False):
        assert next_birth == event.epoch + event.data["wait"]
    refused = [
        event
        for event in recorder.of(EventType.REFUSED)
        if "after an undoing" in event.data["reason"]
    ]
    assert refused
    epochs = {event.epoch: event.data for event in recorder.of(EventType.EPOCH)}
    assert all(epochs[event.epoch]["reward"] == 0.0 for event in refused)
    assert [entry for entry in episode.refused if "after an undoing" in entry[2]]


def test_a_seed_that_is_kept_brings_the_wait_back() -> None:
    episode = prepared(after=10**9)
    episode.trial._next_wait = 5
    go(
        episode,
        Script(e1=germinate("early", "conv_light"), e8=Decision(op=Op.FOSSILIZE, slot="early")),
        8,
    )
    assert episode.model.fossils == 1
    assert episode.trial._next_wait == GROWTH.undo_wait
    assert episode.trial.slot is None


def on_trial(directory: Path) -> dict[str, Any]:
    """A checkpoint that was taken while a seed is on trial, and a copy of all it says."""
    episode = prepared()
    checkpoints = Checkpoints(directory, CONFIG.checkpoint)
    with episode.random.active():
        go(episode, Script(e1=germinate("early", "bad")), 4)
        checkpoints.take(episode)
    checkpoints.write()
    return load(saved(directory)[-1])


def without_the_first_weight(trial: dict[str, Any]) -> None:
    weights = trial["before"]["model"]
    del weights[next(name for name in weights if name.startswith("host."))]


def with_a_wrong_shape(trial: dict[str, Any]) -> None:
    trial["before"]["model"]["host.head.2.weight"] = torch.zeros(2, 3)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no trial": lambda trial: trial.update(slot=None, before=None, right=None),
    "another slot": lambda trial: trial.update(slot="mid"),
    "no state": lambda trial: trial.update(before=None),
    "no seeds": lambda trial: trial["before"].pop("seeds"),
    "no momentum": lambda trial: trial["before"].pop("optimizers"),
    "no rows": lambda trial: trial.update(right=None),
    "no key": lambda trial: trial.pop("before"),
    "no weight": without_the_first_weight,
    "a wrong shape": with_a_wrong_shape,
}


@pytest.mark.parametrize("broken", list(BROKEN))
def test_a_checkpoint_that_could_not_undo_its_seed_is_refused(broken: str, tmp_path: Path) -> None:
    state = on_trial(tmp_path)
    restore(state, prepared())
    BROKEN[broken](state["parts"]["trial"])
    with pytest.raises(ValueError, match="trial: "):
        restore(state, prepared())


def test_a_checkpoint_without_its_trial_is_refused(tmp_path: Path) -> None:
    state = on_trial(tmp_path)
    del state["parts"]["trial"]
    with pytest.raises(ValueError, match="trial"):
        restore(state, prepared())


@pytest.mark.parametrize("killed_after", [4, 5, 6])
def test_a_run_killed_while_a_seed_is_on_trial_still_undoes(
    killed_after: int, tmp_path: Path
) -> None:
    """The state is in the checkpoint: a fresh process ends bit for bit as the whole run does."""
    script = {"e1": germinate("early", "bad")}
    whole = prepared()
    states = go(whole, Script(**script), 9)
    checkpoints = Checkpoints(tmp_path, replace(CONFIG.checkpoint, every=1))
    interrupted = prepared()
    interrupted.policy = Script(**script)
    with interrupted.random.active():
        for number in range(1, killed_after + 1):
            epoch = Epoch(interrupted, number)
            signals = epoch.observe(epoch.launch().read())
            assert signals is not None
            epoch.apply(interrupted.policy.decide(signals))
            interrupted.epoch = number
        checkpoints.take(interrupted)
    resumed = prepared()
    resumed.policy = Script(**script)
    restore(load(saved(tmp_path)[-1]), resumed)
    rest = go(resumed, Script(**script), 9)
    assert_same(rest, {number: state for number, state in states.items() if number > killed_after})
    assert resumed.trial.undone == 1
    assert_same(rest[7]["host"], states[4]["host"])
