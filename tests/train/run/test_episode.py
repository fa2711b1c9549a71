"""Whole runs: the order of an epoch, what is reported, and that a seed makes a run repeatable."""

from dataclasses import replace

import pytest
import torch

from esper_train import (
    Decision,
    Event,
    EventType,
    HostConfig,
    Idle,
    NonFiniteLossError,
    Op,
    OptimConfig,
    RunConfig,
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
from esper_train.run import measure
from esper_train.run import run as run_module
from esper_train.run.build import build_episode
from tests.helpers.episodes import SHORT, scripted
from tests.helpers.scripted import EASY, Recorder, Script, germinate, run_under


def test_one_epoch_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is train, evaluate, tracker, slots step, decide, execute, for every controller."""
    calls: list[str] = []
    episode = build_episode(replace(SHORT, max_epochs=1), slots=("early",))

    def note(owner: object, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            calls.append(label)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    note(measure, "launch_training", "train")
    note(measure, "launch_evaluation", "evaluate")
    note(run_module, "launch_evaluation", "test")
    note(episode.tracker, "update", "tracker")
    note(episode.model.slot("early"), "step_epoch", "slots step")
    policy = Script(e1=germinate())
    note(policy, "decide", "decide")
    note(episode.model, "germinate_seed", "execute")
    run_under(episode, policy)
    assert calls == ["train", "evaluate", "tracker", "slots step", "decide", "execute", "test"]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_gives_the_network_that_keep_names(keep: str) -> None:
    """The lowest validation loss over the epochs without a trial."""
    recorder = Recorder()
    config = replace(SHORT, max_epochs=12, keep=keep, growth=EASY)  # type: ignore[arg-type]
    episode = build_episode(config, slots=("early",))
    result = run_under(episode, Script(e1=germinate()), TelemetryHub([recorder]))
    epochs = recorder.of(EventType.EPOCH)
    trial = range(4, 13)  # blending begins at the end of epoch 4, and no verdict comes
    offered = [e for e in epochs if e.epoch not in trial]
    best = min(offered, key=lambda e: e.data["validation"]["loss"]).epoch
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
        torch.rand(7)  # the caller's use of the generator changes nothing
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
        ({"device": "cuda:99"}, "'cuda:99' does not exist here.*cpu"),
        ({"device": "toaster"}, "'toaster' is no name of a device"),
        ({"device": "meta"}, "'meta' does not exist here"),
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

    class Ends(Idle):
        def decide(self, signals: Signals) -> Decision:
            if signals.epoch == 3:
                raise error
            return super().decide(signals)

    with pytest.raises(type(error)):
        run_heuristic_episode(SHORT, policy=Ends(), hub=TelemetryHub([recorder]))
    last = recorder.events[-1]
    assert (last.type, last.data["status"], last.epoch) == (EventType.RUN_FINISHED, status, 3)
    assert len(recorder.of(EventType.EPOCH)) == 2
