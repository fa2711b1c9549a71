"""Seeds in whole runs: their stages, their measurements, and refused requests."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from esper_train import (
    Blueprint,
    BlueprintRegistry,
    Decision,
    EventType,
    Op,
    SeedStage,
    Signals,
    TelemetryConfig,
    TelemetryHub,
    get_task,
    run_heuristic_episode,
)
from esper_train.morph.blueprints import convolution
from esper_train.run import measure
from esper_train.run.build import build_episode
from tests.helpers.episodes import SHORT, scripted
from tests.helpers.scripted import EASY, Recorder, Script, germinate, run_under


def test_a_whole_life_epoch_by_epoch() -> None:
    """A seed that germinates after epoch 1 trains from epoch 2 on (no idle epoch), blends after 3,
    and so on."""
    config = replace(SHORT, max_epochs=9, growth=EASY)
    policy = Script(e1=germinate(), e8=Decision(op=Op.FOSSILIZE, slot="early"))
    result, recorder = scripted(config, policy)
    assert recorder.stages() == [
        (1, "early", "GERMINATED"),
        (1, "early", "TRAINING"),
        (4, "early", "BLENDING"),
        (7, "early", "PROBATIONARY"),
        (8, "early", "FOSSILIZED"),
    ]
    alphas = [next(s.alpha for s in signals.slots if s.slot == "early") for signals in policy.seen]
    assert alphas == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])
    assert result.fossils == 1
    assert len(result.contributions) == 1


def test_measurements_that_let_a_seed_grow_are_always_made() -> None:
    """The gradient ratio is measured while it trains, the contribution whenever alpha was above 0,
    and never else."""
    config = replace(SHORT, max_epochs=8, growth=EASY)
    policy = Script(e1=germinate(), e2=germinate("late", "norm"))
    scripted(config, policy)
    for signals in policy.seen:
        for state in signals.slots:
            seated = state.stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY)
            if seated and state.epochs_in_stage > 0:
                assert state.gradient_ratio is not None
                assert state.gradient_ratio > 0
            if state.stage is SeedStage.TRAINING:
                assert state.contribution is None
            if state.stage is SeedStage.BLENDING and state.epochs_in_stage > 0:
                assert state.contribution is not None


def test_contribution_is_the_validation_accuracy_lost_without_the_seed() -> None:
    """It is measured again independently: same weights, the slot ablated by hand."""
    config = replace(SHORT, max_epochs=8, growth=EASY)
    recorder = Recorder()
    episode = build_episode(config, slots=("early",))
    run_under(episode, Script(e1=germinate()), TelemetryHub([recorder]))
    last = recorder.of(EventType.EPOCH)[-1].data
    (slot,) = last["slots"]
    inputs, targets = get_task("synthetic").load().validation
    model = episode.model.eval()
    with torch.no_grad():
        whole = (model(inputs).argmax(1) == targets).double().mean().item() * 100
        bare = (model.host(inputs).argmax(1) == targets).double().mean().item() * 100
    assert last["validation"]["accuracy"] == pytest.approx(whole)
    assert slot["contribution"] == pytest.approx(whole - bare)


def test_gradient_ratio_equals_plain_torch_on_the_last_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain torch takes the norms of the .grad fields that the last step left behind, corrected for
    the sizes."""
    config = replace(SHORT, max_epochs=2, growth=EASY)
    episode = build_episode(config, slots=("mid",))
    ratios = []
    inner = measure.gradient_ratio

    def spy(grad: object, seed_grad: object) -> float | None:
        ratio = inner(grad, seed_grad)  # type: ignore[arg-type]
        seed = [p.grad for p in episode.model.get_seed_parameters("mid")]
        host = [p.grad for p in episode.model.get_host_parameters()]
        if seed:
            counts = [sum(g.numel() for g in grads) for grads in (seed, host)]
            norms = [
                math.hypot(*(g.double().norm().item() for g in grads)) for grads in (seed, host)
            ]
            ratios.append((ratio, norms[0] / norms[1] * math.sqrt(counts[1] / counts[0])))
        return ratio

    monkeypatch.setattr(measure, "gradient_ratio", spy)
    run_under(episode, Script(e1=germinate("mid")))
    assert len(ratios) == 1
    assert ratios[0][0] == pytest.approx(ratios[0][1], rel=1e-5)


def test_optimizers_follow_the_seeds() -> None:
    config = replace(SHORT, max_epochs=4, growth=EASY)
    episode = build_episode(config, slots=("early", "mid"))
    policy = Script(
        e1=germinate(), e2=germinate("mid"), e3=Decision(op=Op.CULL, slot="early", reason="test")
    )
    run_under(episode, policy)
    parameters = episode.optimizers.parameters()
    assert set(parameters) == {"host", "mid"}
    assert {id(p) for p in parameters["mid"]} == {
        id(p) for p in episode.model.get_seed_parameters("mid")
    }
    assert {id(p) for p in parameters["host"]} == {
        id(p) for p in episode.model.get_host_parameters()
    }


@pytest.mark.parametrize("on_fossilize", ["keep", "freeze"])
def test_fossils_keep_training_or_are_frozen(on_fossilize: str) -> None:
    config = replace(SHORT, max_epochs=10, growth=replace(EASY, on_fossilize=on_fossilize))  # type: ignore[arg-type]
    episode = build_episode(config, slots=("early",))
    weights: dict[int, torch.Tensor] = {}

    class Watch(Script):
        def decide(self, signals: Signals) -> Decision:
            seed = episode.model.slot("early").seed
            if seed is not None:
                weights[signals.epoch] = torch.cat(
                    [p.detach().flatten().clone() for p in seed.parameters()]
                )
            return super().decide(signals)

    run_under(episode, Watch(e1=germinate(), e8=Decision(op=Op.FOSSILIZE, slot="early")))
    assert episode.model.fossils == 1
    assert ("early" in episode.optimizers) is (on_fossilize == "keep")
    assert torch.equal(weights[8], weights[10]) is (on_fossilize == "freeze")


def test_the_host_shrinks_when_a_seed_is_kept() -> None:
    """Its matrices do, after the network of that epoch was offered as the best."""
    found = {}
    for factor in (1.0, 0.5):
        growth = replace(EASY, shrink_host=factor)
        config = replace(SHORT, max_epochs=8, keep="last", growth=growth)
        episode = build_episode(config, slots=("early",))
        run_under(episode, Script(e1=germinate(), e8=Decision(op=Op.FOSSILIZE, slot="early")))
        assert episode.model.fossils == 1
        found[factor] = episode
    whole, shrunk = (found[factor].model.state_dict() for factor in (1.0, 0.5))
    matrices = {f"host.{n}" for n, p in found[1.0].model.host.named_parameters() if p.dim() > 1}
    assert matrices
    for name, value in whole.items():
        assert torch.equal(shrunk[name], value * 0.5 if name in matrices else value), name
    kept = [found[factor].kept.state_dict()["network"]["weights"] for factor in (1.0, 0.5)]
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)


def test_seed_without_parameters_lives() -> None:
    registry = BlueprintRegistry(
        [
            Blueprint("pass", "cnn", lambda channels: nn.Identity()),
            Blueprint("conv_light", "cnn", convolution),
        ]
    )
    config = replace(SHORT, max_epochs=8, growth=replace(EASY, incubation="straight_through"))
    _, recorder = scripted(config, Script(e1=germinate(blueprint="pass")), registry=registry)
    assert (7, "early", "PROBATIONARY") in recorder.stages()


def test_refused_request_is_reported_and_changes_nothing() -> None:
    policy = Script(
        e1=Decision(op=Op.FOSSILIZE, slot="early"),
        e3=Decision(op=Op.CULL, slot="mid"),
    )
    result, recorder = scripted(SHORT, policy)
    assert recorder.stages() == []
    epochs = [e.data for e in recorder.of(EventType.EPOCH)]
    refusals = [data["refused"] for data in epochs]
    assert "cannot go from DORMANT to FOSSILIZED" in refusals[0]
    assert "cannot go from DORMANT to CULLED" in refusals[2]
    assert refusals[1::2] == [None, None, None]
    assert [epochs[0]["reward"], epochs[0]["reward_parts"]] == [0.0, {}]
    assert result.action_counts == {"WAIT": 4, "GERMINATE": 0, "CULL": 1, "FOSSILIZE": 1}
    assert result.refused == ((1, "FOSSILIZE", refusals[0]), (3, "CULL", refusals[2]))
    assert [(e.epoch, e.data["op"]) for e in recorder.of(EventType.REFUSED)] == [
        (1, "FOSSILIZE"),
        (3, "CULL"),
    ]


@pytest.mark.parametrize("level", ["minimal", "normal", "debug"])
def test_a_refusal_is_an_event_at_every_level_but_off(level: str) -> None:
    recorder = Recorder()
    hub = TelemetryHub([recorder], TelemetryConfig(level=level))  # type: ignore[arg-type]
    policy = Script(e1=Decision(op=Op.CULL, slot="mid"))
    run_heuristic_episode(replace(SHORT, max_epochs=1), policy=policy, hub=hub)
    assert len(recorder.of(EventType.REFUSED)) == 1


@pytest.mark.parametrize(
    "decision",
    [
        germinate(blueprint="conv_lite"),
        germinate("nowhere"),
        germinate(blend="liner"),
        Decision(op=Op.CULL, slot="x"),
    ],
)
def test_names_that_nobody_knows_raise_at_once(decision: Decision) -> None:
    with pytest.raises(ValueError, match="unknown"):
        scripted(SHORT, Script(e1=decision))
