"""Numbers going bad: what the governor finds, and what each policy does about planted faults."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import Meter
from esper_train import (
    BadNumbersError,
    Decision,
    EventType,
    GovernorConfig,
    GradConfig,
    NonFiniteLossError,
    Op,
    RunConfig,
    SeedStage,
    TelemetryConfig,
    TelemetryHub,
    TrainConfig,
    build_train_step,
    train_one_epoch,
)
from esper_train.control.governor import Finding, Governor, weights_are_finite
from esper_train.run import directory as run_directory
from esper_train.run.build import build_episode
from esper_train.run.episode import Episode
from esper_train.run.report import write_report
from esper_train.telemetry.sinks import JsonlSink
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

QUICK = GovernorConfig(min_history=2, patience=1, snapshot_epochs=2)
# seeds whose seeds contribute, here and below
SHORT = RunConfig(
    task="synthetic",
    max_epochs=6,
    max_batches=4,
    seed=2,
    batch_size=32,
    growth=EASY,
    governor=QUICK,
    keep="last",
)


def config(policy: str, **changes: Any) -> RunConfig:
    return replace(SHORT, train=TrainConfig(on_bad_numbers=policy), **changes)  # type: ignore[arg-type]


# the governor


def judged(*losses: float, guess: float = math.log(10), **changes: Any) -> list[str | None]:
    """Kinds of finding, epoch by epoch."""
    governor = Governor(replace(GovernorConfig(patience=1), **changes), guess)
    found = [governor.check(training=0.5, validation=loss) for loss in losses]
    return [None if finding is None else finding.kind for finding in found]


def test_a_loss_far_above_its_own_history_and_above_a_guess_diverged() -> None:
    """Mean 1.2, deviation 0: more than 3 times that, and than the guess's 2.303, is needed."""
    calm = (1.2,) * 5
    assert judged(*calm, 3.7) == [None] * 5 + ["divergence"]
    assert judged(*calm, 3.5) == [None] * 6
    assert judged(*(0.1,) * 5, 2.0) == [None] * 6  # 20 times the mean, but better than guessing
    assert judged(*(0.1,) * 5, 2.5) == [None] * 5 + ["divergence"]


def test_a_loss_that_always_varied_needs_more_to_diverge() -> None:
    """Mean 2, population deviation sqrt(2): 2 + 6 sqrt(2) = 10.49."""
    varied = (0.0, 1.0, 2.0, 3.0, 4.0)
    assert judged(*varied, 10.4) == [None] * 6
    assert judged(*varied, 10.6) == [None] * 5 + ["divergence"]


def test_a_loss_that_falls_back_to_a_guess_collapsed() -> None:
    learned = (1.0,) * 5
    assert judged(*learned, 2.303) == [None] * 5 + ["collapse"]
    assert judged(*learned, 2.45) == [None] * 5 + ["collapse"]  # within 6.5 % of ln 10
    assert judged(*learned, 2.46) == [None] * 6
    assert judged(*learned, 4.605, guess=math.log(100), multiplier=10.0)[-1] == "collapse"
    assert judged(*(1.5,) * 5, 2.303) == [None] * 6  # had not learned: 1.5 is above .6 ln 10


@pytest.mark.parametrize(
    "losses", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)]
)
def test_a_loss_that_is_not_finite_is_found_at_once(losses: tuple[float, float]) -> None:
    finding = Governor(GovernorConfig(), math.log(10)).check(
        training=losses[0], validation=losses[1]
    )
    assert finding is not None
    assert finding.kind == "nonfinite"
    assert f"training {losses[0]}, validation {losses[1]}" in finding.message


def test_no_comparison_before_there_is_a_history() -> None:
    assert judged(*(0.1,) * 4, 100.0) == [None] * 5
    assert judged(0.1, 0.1, 100.0, min_history=2)[-1] == "divergence"


def test_patience_counts_suspicious_epochs_in_a_row() -> None:
    calm = (0.1,) * 5
    assert judged(*calm, 9.0, 9.0, 0.1, 9.0, 9.0, 9.0, patience=3) == [None] * 10 + ["divergence"]


def test_suspicious_epochs_do_not_spoil_the_history() -> None:
    """Were 9.0 in the history, its mean would be above 3 and 9.0 no divergence."""
    assert judged(*(0.1,) * 5, *(9.0,) * 20) == [None] * 5 + ["divergence"] * 20


def test_the_history_is_a_window() -> None:
    """Old losses of 100 leave it; then 7 is far from the last ten of 1."""
    losses = (100.0,) * 5 + (1.0,) * 10 + (7.0,)
    assert judged(*losses, window=10)[-1] == "divergence"
    assert judged(*losses, window=20)[-1] is None


def test_a_governor_goes_on_from_its_state() -> None:
    """A fourth suspicious epoch of four needed, the history from before: without its state there
    would be neither."""
    config = GovernorConfig(patience=4)
    first, second = (Governor(config, math.log(10)) for _ in range(2))
    for loss in (*(0.1,) * 5, *(9.0,) * 3):
        assert first.check(training=0.5, validation=loss) is None
    first.rollbacks = 2
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = second.check(training=0.5, validation=9.0)
    assert found is not None
    assert (found.kind, second.rollbacks) == ("divergence", 2)


# a skipped step


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 10),
    )


def data(*bad: int) -> list[tuple[Tensor, Tensor]]:
    """Five batches, those of the given places not finite."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 4, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(5)
    ]
    return [not_a_number(*batch) if i in bad else batch for i, batch in enumerate(batches)]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def plain_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("optimizer", [sgd, plain_sgd, adamw])
@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 4)])
def test_a_skipped_step_changes_no_bit(optimizer: Any, bad: tuple[int, ...]) -> None:
    """Weights, running statistics and optimizer state after the epoch are those of an epoch without
    these batches."""
    skipping = TrainConfig(on_bad_numbers="skip")
    sparing = TrainConfig()
    models = network(), network()
    optimizers = [optimizer(model) for model in models]
    whole = train_one_epoch(
        models[0], data(*bad), optimizers[0], skipping, task_type="classification"
    )
    good = [batch for i, batch in enumerate(data()) if i not in bad]
    train_one_epoch(models[1], good, optimizers[1], sparing, task_type="classification")
    assert whole.skipped == len(bad)
    assert whole.nonfinite == 8 * len(bad)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    states = [list(o.state_dict()["state"].values()) for o in optimizers]
    assert len(states[0]) == len(states[1])
    for ours, theirs in zip(*states, strict=True):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert value is theirs[key] is None or torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_skipping_needs_no_further_sync(optimizer: Any) -> None:
    from esper_kernels.testing import SyncCounter

    model = network()
    with SyncCounter() as counter:
        result = train_one_epoch(
            model,
            data(1),
            optimizer(model),
            TrainConfig(on_bad_numbers="skip"),
            task_type="classification",
        )
    assert counter.count == 1
    assert result.skipped == 1


def test_an_optimizer_that_cannot_skip_is_refused() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"fused=True.*SGD.*on_bad_numbers"):
        train_one_epoch(
            model, data(), plain, TrainConfig(on_bad_numbers="skip"), task_type="classification"
        )
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_optimizer_restored_from_one_that_cannot_skip_is_refused() -> None:
    """A state brings the setting with it, so that what the optimizer was made with says nothing."""
    model = network()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    restored = sgd(model)
    restored.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="fused=True"):
        train_one_epoch(
            model, data(), restored, TrainConfig(on_bad_numbers="skip"), task_type="classification"
        )


def test_a_step_counts_bad_targets_apart_from_ignored_ones() -> None:
    meter = Meter("cpu")
    inputs, targets = data()[0]
    targets[:4] = torch.tensor([-100, 10, -1, -100])
    model = network()
    build_train_step("classification", TrainConfig(on_bad_numbers="warn"))(
        model, inputs, targets, meter
    )
    result = meter.compute(strict=False)
    assert (result.valid, result.ignored, result.bad_targets) == (4, 2, 2)
    assert targets[1] == 10  # the caller's own are as they were
    with pytest.raises(IndexError, match="10"):
        build_train_step("classification", TrainConfig())(model, inputs, targets, meter)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of warn, skip, stop, rollback, got 'ignore'"):
        TrainConfig(on_bad_numbers="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'skip' needs train.grad.every = 1, got 2"):
        TrainConfig(on_bad_numbers="skip", grad=GradConfig(every=2))
    with pytest.raises(ValueError, match=r"governor\.patience must be at least 1, got 0"):
        GovernorConfig(patience=0)
    with pytest.raises(ValueError, match="min_history must not exceed window, got 30"):
        GovernorConfig(min_history=30)
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        build_episode(replace(SHORT, governor=GovernorConfig(snapshot_device="cuda:99")), slots=())


# a snapshot


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
    # a second time from there, the same: so nothing was left behind
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
    """On `meta`, which has no memory, so that what is really moved shows without an accelerator."""
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
    assert weights_are_finite(episode.model)
    seed = next(iter(episode.model.get_seed_parameters()))
    with torch.no_grad():
        seed.view(-1)[0] = math.inf
    assert not weights_are_finite(episode.model)


# whole runs


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
    """Planted in batch 2 of epoch 3."""
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
