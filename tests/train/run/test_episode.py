"""Whole runs: the order of an epoch, what grows, what is reported, and that a seed makes a run
repeatable."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esper_train import (
    Blueprint,
    BlueprintRegistry,
    Decision,
    Event,
    EventType,
    HostConfig,
    NonFiniteLossError,
    Op,
    OptimConfig,
    RunConfig,
    SeedStage,
    Signals,
    Splits,
    Task,
    TelemetryConfig,
    TelemetryHub,
    get_task,
    run_fit,
    run_heuristic_episode,
    train_heuristic,
)
from esper_train.base.device import resolve_device
from esper_train.morph.blueprints import convolution
from esper_train.run import measure
from esper_train.run import run as run_module
from esper_train.run.build import build_episode
from tests.helpers.scripted import EASY, Recorder, Script, germinate, run_under

# whose seeds contribute
SHORT = RunConfig(task="synthetic", max_epochs=6, max_batches=4, seed=2, keep="last")


def scripted(config: RunConfig, policy: Script, **kwargs: object) -> tuple[object, Recorder]:
    recorder = Recorder()
    result = run_heuristic_episode(config, policy=policy, hub=TelemetryHub([recorder]), **kwargs)  # type: ignore[arg-type]
    return result, recorder


def test_a_whole_life_epoch_by_epoch() -> None:
    """Germinated after epoch 1, it trains from epoch 2 on (no idle epoch), blends after 3, and so
    on."""
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
    """Gradient ratio while it trains; contribution whenever alpha was above 0, and never else."""
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
    """Measured again from the outside: same weights, slot ablated by hand."""
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
    """Norms taken by torch from the .grad fields the last step left behind, corrected for the
    sizes."""
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


def test_one_epoch_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """train, evaluate, tracker, slots step, decide, execute: for every controller."""
    calls: list[str] = []
    episode = build_episode(replace(SHORT, max_epochs=1), slots=("early",))

    def note(owner: object, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            calls.append(label)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    note(measure, "train_one_epoch", "train")
    note(measure, "evaluate", "evaluate")
    note(run_module, "evaluate", "test")
    note(episode.tracker, "update", "tracker")
    note(episode.model.slot("early"), "step_epoch", "slots step")
    policy = Script(e1=germinate())
    note(policy, "decide", "decide")
    note(episode.model, "germinate_seed", "execute")
    run_under(episode, policy)
    assert calls == ["train", "evaluate", "tracker", "slots step", "decide", "execute", "test"]


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


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_gives_the_network_that_keep_names(keep: str) -> None:
    """The best validation accuracy, and of equal ones the lowest loss, over the epochs without a
    trial."""
    recorder = Recorder()
    config = replace(SHORT, max_epochs=12, keep=keep, growth=EASY)  # type: ignore[arg-type]
    episode = build_episode(config, slots=("early",))
    result = run_under(episode, Script(e1=germinate()), TelemetryHub([recorder]))
    epochs = recorder.of(EventType.EPOCH)
    trial = range(4, 13)  # blending begins at the end of epoch 4, and no verdict comes
    offered = [e for e in epochs if e.epoch not in trial]
    best = max(
        offered, key=lambda e: (e.data["validation"]["accuracy"], -e.data["validation"]["loss"])
    ).epoch
    assert result.kept_epoch == (best if keep == "best" else 12)
    if keep == "best":
        inputs, targets = get_task("synthetic").load().validation
        with torch.no_grad():
            found = (result.model.eval()(inputs).argmax(1) == targets).double().mean().item() * 100
        assert found == pytest.approx(epochs[best - 1].data["validation"]["accuracy"])
    assert recorder.events[-1].data["kept_epoch"] == result.kept_epoch


def test_same_seed_same_numbers_twice() -> None:
    config = replace(SHORT, max_epochs=9, growth=EASY)
    lines = []
    for _ in range(2):
        torch.rand(7)  # the caller's own use of the generator has no part in it
        policy = Script(e1=germinate(), e8=Decision(op=Op.FOSSILIZE, slot="early"))
        _, recorder = scripted(config, policy)
        lines.append(
            [Event(e.type, e.epoch, without_clock(e.data)).to_json() for e in recorder.events]
        )
    assert lines[0] == lines[1]
    _, other = scripted(replace(config, seed=1), Script())
    assert other.of(EventType.EPOCH)[0].data["train"]["loss"] != pytest.approx(
        recorder.of(EventType.EPOCH)[0].data["train"]["loss"]
    )


def without_clock(data: object) -> dict[str, object]:
    assert isinstance(data, dict)
    plain = {key: value for key, value in data.items() if key != "seconds"}
    return plain | {key: without_clock(value) for key, value in plain.items() if key == "train"}


def test_a_run_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_fit(replace(SHORT, max_epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_fit_equals_a_heuristic_run_that_never_grows() -> None:
    """The same loop: with a controller that waits, the learned weights are those of `fit`, bit for
    bit."""
    waiting, _ = scripted(SHORT, Script())
    plain = run_fit(SHORT)
    for a, b in zip(waiting.model.host.parameters(), plain.model.host.parameters(), strict=True):
        assert torch.equal(a, b)
    assert waiting.test.loss == plain.test.loss


def test_telemetry_level_does_not_change_training() -> None:
    growing = replace(SHORT, max_epochs=5, growth=EASY)
    weights = []
    for level in ("off", "normal"):
        recorder = Recorder()
        hub = TelemetryHub([recorder], TelemetryConfig(level=level))  # type: ignore[arg-type]
        result = run_heuristic_episode(growing, policy=Script(e1=germinate()), hub=hub)
        weights.append(result.model.state_dict())
        assert (recorder.events == []) is (level == "off")
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_train_heuristic_runs_episodes_with_their_own_seeds() -> None:
    recorder = Recorder()
    results = train_heuristic(
        replace(SHORT, max_epochs=1, episodes=2, seed=7), hub=TelemetryHub([recorder])
    )
    assert len(results) == 2
    assert [e.data["seed"] for e in recorder.of(EventType.RUN_STARTED)] == [7, 1007]


def test_language_model_task_grows() -> None:
    config = RunConfig(task="synthetic-lm", max_epochs=8, max_batches=4, growth=EASY)
    result, recorder = scripted(config, Script(e1=germinate(blueprint="mlp")))
    assert (7, "early", "PROBATIONARY") in recorder.stages()
    assert result.test.valid == 128 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": ()}, "no slots"),
        ({"slots": ("early", "early")}, "more than once"),
        ({"slots": ("early", "middle")}, "'middle'.*'mid'"),
        ({"slots": ("late",), "host": HostConfig(depth=2)}, "'late'"),
        ({"task": "digit"}, "'digit'.*'digits'"),
        ({"device": "cuda:99"}, "'cuda:99' is not there.*cpu"),
        ({"device": "toaster"}, "'toaster' names no device"),
        ({"device": "meta"}, "'meta' is not there"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    change: dict[str, object], message: str
) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        run_heuristic_episode(replace(SHORT, **change), hub=TelemetryHub([recorder]))  # type: ignore[arg-type]
    assert recorder.events == []


def test_resolve_device_takes_the_cpu() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cpu:0").type == "cpu"


def custom_task(inputs: torch.Tensor, targets: torch.Tensor) -> Task:
    synthetic = get_task("synthetic")
    splits = Splits(train=(inputs, targets), validation=(inputs, targets), test=(inputs, targets))
    return replace(synthetic, name="own", load=lambda: splits)


def test_a_users_own_task_runs() -> None:
    inputs = torch.randn(40, 1, 8, 8)
    targets = torch.arange(40) % 10
    result = run_fit(replace(SHORT, max_epochs=1), task=custom_task(inputs, targets))
    assert result.test.valid == 40


def test_a_loss_that_is_not_finite_ends_the_run_with_an_event() -> None:
    recorder = Recorder()
    config = replace(SHORT, optim=OptimConfig(host_lr=1e30))
    with pytest.raises(NonFiniteLossError, match="in epoch 1 the loss is not finite"):
        run_fit(config, hub=TelemetryHub([recorder]))
    (finding,) = recorder.of(EventType.NONFINITE)
    assert finding.data["logits"] > 0
    assert recorder.events[-1].type is EventType.RUN_FINISHED
    assert recorder.events[-1].data["status"] == "nonfinite"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("boom"), "failed")]
)
def test_an_ended_run_says_how(error: BaseException, status: str) -> None:
    recorder = Recorder()

    def decide(signals: Signals) -> Decision:
        if signals.epoch == 3:
            raise error
        return Decision(op=Op.WAIT)

    policy = SimpleNamespace(decide=decide, reset=lambda: None)
    with pytest.raises(type(error)):
        run_heuristic_episode(SHORT, policy=policy, hub=TelemetryHub([recorder]))
    last = recorder.events[-1]
    assert (last.type, last.data["status"], last.epoch) == (EventType.RUN_FINISHED, status, 3)
    assert len(recorder.of(EventType.EPOCH)) == 2
