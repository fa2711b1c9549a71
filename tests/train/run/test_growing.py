"""Several seeds at once: their joint contribution, limits, and optimizers that follow every
change."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper_train import (
    Decision,
    EventType,
    Op,
    RunConfig,
    SeedStage,
    Signals,
    TelemetryConfig,
    TelemetryHub,
    get_task,
    run_heuristic_episode,
)
from esper_train.morph.lifecycle import Measurement
from esper_train.run.build import build_episode
from esper_train.run.episode import Episode
from esper_train.run.execute import execute, follow_optimizers
from tests.helpers.scripted import EASY, Recorder, Script, germinate, run_under

SHORT = RunConfig(task="synthetic", max_epochs=12, max_batches=3, growth=EASY, keep="last")


def keep(slot: str) -> Decision:
    return Decision(op=Op.FOSSILIZE, slot=slot)


def record(
    config: RunConfig, policy: Script | None = None, level: str = "normal", **telemetry: Any
) -> Recorder:
    recorder = Recorder()
    hub = TelemetryHub([recorder], TelemetryConfig(level=level, **telemetry))  # type: ignore[arg-type]
    run_heuristic_episode(config, policy=policy, hub=hub)
    return recorder


def test_two_seeds_are_measured_each_and_together() -> None:
    """The joint contribution again, measured independently: both slots ablated by hand on the final
    weights."""
    recorder = Recorder()
    episode = build_episode(replace(SHORT, max_epochs=10), slots=("early", "mid"))
    script = Script(e1=germinate("early"), e2=germinate("mid"), e8=keep("early"))
    run_under(episode, script, TelemetryHub([recorder]), mode="test")
    last = recorder.of(EventType.EPOCH)[-1].data
    inputs, targets = get_task("synthetic").load().validation
    model = episode.model.eval()

    def accuracy(early: float = 1.0, mid: float = 1 / 3) -> float:
        """The accuracy at alphas, by default those of the 10th epoch: one seed is kept, the other
        in the first of its three epochs of blending."""
        with torch.no_grad():
            logits = model(inputs, alpha={"early": early, "mid": mid})
        return (logits.argmax(1) == targets).double().mean().item() * 100

    whole = accuracy()
    together = whole - accuracy(early=0, mid=0)
    assert last["joint"] == {"slots": ["early", "mid"], "contribution": pytest.approx(together)}
    assert last["passes"] == 4  # the network, without each, without both
    early, mid = last["slots"]
    assert early["contribution"] == pytest.approx(whole - accuracy(early=0))
    assert mid["contribution"] == pytest.approx(whole - accuracy(mid=0))


def test_there_is_no_joint_contribution_of_one_seed() -> None:
    epochs = record(replace(SHORT, max_epochs=8), Script(e1=germinate("early"))).of(EventType.EPOCH)
    assert [e.data["joint"] for e in epochs] == [None] * 8


def test_a_fossil_is_measured_again_now_and_then() -> None:
    """Every third epoch, and in the last."""
    config = replace(SHORT, max_epochs=7, growth=replace(EASY, fossil_check_epochs=3))
    recorder = Recorder()
    episode = build_episode(config, slots=("early",))
    for change in episode.model.germinate_seed("norm", "seed_0", slot="early"):
        follow_optimizers(episode, change, 0)
    slot = episode.model.slot("early")
    fossil = replace(slot.state, stage=SeedStage.FOSSILIZED, alpha=1.0)
    slot.restore(fossil, episode.model.registry.require("cnn", "norm"))
    run_under(episode, Script(), TelemetryHub([recorder]), mode="test")
    epochs = recorder.of(EventType.EPOCH)
    assert [e.epoch for e in epochs if e.data["slots"][0]["contribution"] is not None] == [3, 6, 7]


def test_max_seeds_refuses_another() -> None:
    config = replace(SHORT, max_epochs=3, growth=replace(EASY, max_seeds=1))
    epochs = record(config, Script(e1=germinate("early"), e2=germinate("mid"))).of(EventType.EPOCH)
    assert epochs[0].data["refused"] is None
    assert "growth.max_seeds is 1" in epochs[1].data["refused"]


def test_heuristic_seats_as_many_live_seeds_as_it_may() -> None:
    policy = replace(
        SHORT.policy, max_live_seeds=2, plateau_threshold=1000.0, min_epochs=1, life_margin=-100
    )
    recorder = record(
        replace(SHORT, policy=policy, max_epochs=6, growth=replace(EASY, training_timeout=50))
    )
    live = [
        sum(s["stage"] in ("TRAINING", "BLENDING", "PROBATIONARY") for s in e.data["slots"])
        for e in recorder.of(EventType.EPOCH)
    ]
    assert max(live) == 2


def test_gated_run_trains_the_gate_and_drops_its_optimizer_at_alpha_one() -> None:
    groups: dict[int, set[str]] = {}
    episode = build_episode(replace(SHORT, max_epochs=9), slots=("early",))

    class Watch(Script):
        def decide(self, signals: Signals) -> Decision:
            groups[signals.epoch] = set(episode.optimizers.parameters())
            return super().decide(signals)

    run_under(episode, Watch(e1=germinate("early", blend="gated")), mode="test")
    # blending in epochs 5 to 7; at the end of the 7th, before the controller decides, the seed is
    # on probation, and its gate is let go
    assert groups[2] == groups[6] == {"host", "early", "early.gate"}
    assert groups[7] == {"host", "early"}


@pytest.mark.parametrize(
    ("level", "lifecycle_only", "kinds"),
    [
        ("off", False, set()),
        ("minimal", False, {"run_started", "seed_stage", "run_finished"}),
        ("normal", False, {"run_started", "seed_stage", "run_finished", "epoch", "seed_cost"}),
        (
            "debug",
            False,
            {"run_started", "seed_stage", "run_finished", "epoch", "seed_cost", "layer_gradients"},
        ),
        ("debug", True, {"run_started", "seed_stage", "run_finished"}),
    ],
)
def test_levels_write_what_they_say(level: str, lifecycle_only: bool, kinds: set[str]) -> None:
    recorder = record(
        replace(SHORT, max_epochs=2),
        Script(e1=germinate("early")),
        level,
        lifecycle_only=lifecycle_only,
    )
    assert {event.type.value for event in recorder.events} == kinds


def test_layer_gradients_are_those_of_the_last_batch() -> None:
    recorder = Recorder()
    episode = build_episode(replace(SHORT, max_epochs=1), slots=("early",))
    run_under(
        episode, Script(), TelemetryHub([recorder], TelemetryConfig(level="debug")), mode="test"
    )
    (event,) = recorder.of(EventType.LAYER_GRADIENTS)
    expected = {name: p.grad.double().norm().item() for name, p in episode.model.named_parameters()}  # type: ignore[union-attr]
    assert event.data["norms"] == pytest.approx(expected)


def test_exploding_gradients_escalate_for_some_epochs() -> None:
    """Every gradient explodes by a threshold of 0: with 2 epochs of escalation, from the first
    epoch on."""
    train = replace(SHORT.train, grad=replace(SHORT.train.grad, exploding=0.0))
    quiet = replace(SHORT, max_epochs=3)
    loud = replace(quiet, train=train)
    assert len(record(loud, Script(), escalation_epochs=2).of(EventType.LAYER_GRADIENTS)) == 3
    assert record(loud, Script(), escalation_epochs=0).of(EventType.LAYER_GRADIENTS) == []
    assert record(quiet, Script(), escalation_epochs=2).of(EventType.LAYER_GRADIENTS) == []


def test_escalation_ends_after_its_epochs() -> None:
    hub = TelemetryHub([Recorder()], TelemetryConfig(escalation_epochs=2))
    seen = []
    for epoch in range(4):
        if epoch == 0:
            hub.escalate()
        seen.append(hub.collects(EventType.LAYER_GRADIENTS))
        hub.tick()
    assert seen == [True, True, False, False]
    hub.escalate(1)
    assert hub.collects(EventType.LAYER_GRADIENTS)


def test_as_audited_is_accuracy_counts_and_a_reward_an_epoch() -> None:
    result = run_heuristic_episode(
        replace(SHORT, max_epochs=4), policy=Script(e1=germinate("early"))
    )
    accuracy, counts, rewards = result.as_audited()
    assert accuracy == pytest.approx(100 * result.accuracy)
    assert 0 < result.accuracy <= 1
    assert counts == {"WAIT": 3, "GERMINATE": 1, "CULL": 0, "FOSSILIZE": 0}
    assert len(rewards) == 4


class Lives(RuleBasedStateMachine):
    """Random requests and epochs on a real episode: whatever happens, optimizers hold exactly the
    seated parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.episode: Episode = build_episode(SHORT, slots=("early", "mid"))

    def request(self, decision: Decision) -> None:
        before = [slot.state for slot in self.episode.model.slots]
        try:
            made, refusal = execute(self.episode, decision)
        except ValueError as unknown:
            made = []
            refusal = str(unknown)
        if refusal is not None:
            assert len(refusal) > 10
            assert made == []
            assert [slot.state for slot in self.episode.model.slots] == before
        for change in made:
            follow_optimizers(self.episode, change, 0)

    @rule(
        op=st.sampled_from(list(Op)),
        slot=st.sampled_from(["early", "mid", "late", None]),
        blueprint=st.sampled_from(["norm", "attention", "nonsense", None]),
        blend=st.sampled_from(["linear", "gated", "nonsense", None]),
    )
    def ask(self, op: Op, slot: str | None, blueprint: str | None, blend: str | None) -> None:
        """A decision without the slot or the blueprint that it needs cannot even be made."""
        needs = {Op.WAIT: (), Op.GERMINATE: (slot, blueprint)}.get(op, (slot,))
        make = partial(Decision, op=op, slot=slot, blueprint=blueprint, blend=blend, reason="asked")
        if None in needs:
            with pytest.raises(ValueError, match=f"a decision to {op.name} needs a"):
                make()
        else:
            self.request(make())

    @rule(
        accuracy=st.floats(0, 100),
        contribution=st.none() | st.floats(-5, 5),
        ratio=st.none() | st.floats(0, 10),
    )
    def epoch(self, accuracy: float, contribution: float | None, ratio: float | None) -> None:
        for slot in self.episode.model.slots:
            measured = Measurement(
                accuracy=accuracy,
                contribution=contribution if slot.state.alpha > 0 else None,
                gradient_ratio=ratio,
                potential=1.0,
                potential_loss=-1.0,
                tolerance=100.0,
            )
            slot.observe(measured)
            for change in slot.step_epoch(patience=3):
                follow_optimizers(self.episode, change, 0)

    @invariant()
    def optimizers_hold_the_seated_parameters(self) -> None:
        model = self.episode.model
        expected = {"host": set(model.get_host_parameters())}
        for slot in model.slots:
            name = slot.state.slot
            if slot.seed is not None:
                expected[name] = set(slot.seed.parameters())
            if slot.gate is not None:
                expected[f"{name}.gate"] = set(slot.gate.parameters())
        groups = self.episode.optimizers.parameters()
        assert {name: set(members) for name, members in groups.items()} == expected

    @invariant()
    def the_network_works(self) -> None:
        model = self.episode.model
        assert bool(model(torch.zeros(2, 1, 8, 8)).isfinite().all())
        assert all(
            (slot.seed is None) == (slot.state.stage in (SeedStage.DORMANT, SeedStage.EMBARGOED))
            for slot in model.slots
        )


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=25, stateful_step_count=30)
