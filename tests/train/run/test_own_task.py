"""A task of one's own is a full run: a directory with all that the command leaves, resumed, loaded,
and refused under another name."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_train import (
    EventType,
    NonFiniteLossError,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Splits,
    Task,
    TelemetryHub,
    cli,
    load_run,
    run_fit,
    run_heuristic_episode,
    train_heuristic,
)
from esper_train.run.checkpoint import saved
from esper_train.run.directory import read_metrics
from tests.helpers import own
from tests.helpers.growing_run import reported
from tests.helpers.scripted import EASY, Recorder, Script, germinate

SLOTS = ("early", "mid")
SPLITS = ("train", "validation", "test")
CONFIG = RunConfig(max_epochs=4, batch_size=8, slots=SLOTS, growth=EASY, keep="last")
LEFT = {
    "config.json",
    "config.json.sha256",
    "environment.json",
    "metrics.jsonl",
    "network.pt",
    "network.pt.sha256",
    "checkpoints",
    "report.html",
}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_run_from_python_leaves_all_that_the_command_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "mine"
    result = run_heuristic_episode(CONFIG, task=own.table, out=out)
    assert names(out) == LEFT | {"baseline"}
    assert names(out / "baseline") == LEFT
    said = capsys.readouterr().out
    assert "heuristic: task table" in said
    assert "epoch   4/4" in said
    assert f"report: {out / 'report.html'}" in said
    assert json.loads((out / "config.json").read_text())["task"] == "table"
    assert read_metrics(out)[0]["task"] == "table"
    loaded = load_run(out, task=own.table)
    x = torch.randn(5, own.COLUMNS)
    assert torch.equal(loaded(x), result.model.eval()(x))


@pytest.mark.usefixtures("without_pictures")
def test_the_directory_changes_nothing_of_the_run(tmp_path: Path) -> None:
    bare = run_heuristic_episode(CONFIG, task=own.shuffled)
    kept = run_heuristic_episode(CONFIG, task=own.shuffled, out=tmp_path / "run", baseline=False)
    assert bare.rewards == kept.rewards
    assert bare.accuracy == kept.accuracy
    assert not (tmp_path / "run" / "baseline").exists()
    weights = zip(bare.model.parameters(), kept.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("task", [own.table, own.shuffled], ids=lambda task: task.name)
def test_a_resumed_run_ends_as_one_that_never_stopped(task: Task, tmp_path: Path) -> None:
    """Stopped in the third epoch; the shuffling loader with noise is torch's own, so its batches go
    on where they were."""
    whole = tmp_path / "whole"
    part = tmp_path / "part"
    run_heuristic_episode(CONFIG, task=task, out=whole, baseline=False)
    with pytest.raises(KeyboardInterrupt):
        run_heuristic_episode(CONFIG, task=task, out=part, hub=TelemetryHub([StopAfter(2)]))
    assert [path.name for path in saved(part / "checkpoints")] == ["epoch-2.pt"]
    run_heuristic_episode(CONFIG, task=task, out=part, resume=True, baseline=False)
    assert reported(part) == reported(whole)


@pytest.mark.usefixtures("without_pictures")
def test_the_task_is_asked_for_again_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_fit(replace(CONFIG, max_epochs=1), task=own.table, out=out)
    again = "the run is of a task of your own, 'table'; give it again"
    other = "the run is of task 'table', got task 'images'"
    with pytest.raises(ValueError, match=again):
        load_run(out)
    with pytest.raises(ValueError, match=other):
        load_run(out, task=own.images)
    with pytest.raises(ValueError, match=again):
        run_fit(CONFIG, out=out, resume=True)
    with pytest.raises(ValueError, match=other):
        run_fit(CONFIG, task=own.images, out=out, resume=True)
    for options, words in ([], again), (["--task", "tests.helpers.own:images"], other):
        assert cli.main(["fit", "--resume", str(out), *options]) == 2
        assert words in capsys.readouterr().err
    place = "tests.helpers.own:table"
    assert cli.main(["fit", "--resume", str(out), "--task", place, "--max-epochs", "2"]) == 0
    assert [e["epoch"] for e in read_metrics(out) if e["event"] == "epoch"] == [1, 2]
    assert "table" in capsys.readouterr().out


def test_a_report_needs_no_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    run_fit(replace(CONFIG, max_epochs=1), task=own.table, out=out)
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert "table, fit" in (out / "report.html").read_text()


@pytest.mark.usefixtures("without_pictures")
def test_the_command_takes_a_task_by_its_place(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--task", "tests.helpers.own:table", "--slots", *SLOTS, "--max-epochs", "2"]
    assert cli.main(["heuristic", *options, "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["task"] == "table"
    assert (out / "baseline" / "network.pt").exists()
    file = tmp_path / "run.toml"
    file.write_text('task = "tests.helpers.own:table"\nmax_epochs = 1\n')
    assert cli.main(["fit", "--config", str(file), "--out", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "config.json").read_text())["task"] == "table"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("no_such_module_anywhere:task", "there is no module 'no_such_module_anywhere'"),
        ("tests.helpers.own:nothing", "has no 'nothing'; tasks in it: table, shuffled, images"),
        ("tests.helpers.own:NOT_A_TASK", "expected a Task, got str"),
        (":task", "there is no module ''"),
        ("tests.helpers.own:", "has no ''"),
    ],
)
def test_a_place_without_a_task_is_refused(
    place: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--task", place, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_pictures")
def test_nothing_in_a_run_directory_has_a_module_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_fit(replace(CONFIG, max_epochs=1), task=own.table, out=out)
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "task": "planted:task"}))
    (out / "config.json.sha256").unlink()
    with pytest.raises(ValueError, match="which is no name of a task"):
        load_run(out, task=own.table)
    for options in [], ["--task", "tests.helpers.own:table"]:
        assert cli.main(["fit", "--resume", str(out), *options]) == 2
        assert "which is no name of a task" in capsys.readouterr().err
    assert "planted" not in sys.modules


@pytest.mark.parametrize("name", ["", "a:b", "a/b"])
def test_names_that_a_directory_could_not_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no colon and no slash"):
        replace(own.table, name=name)


def test_a_directory_tells_tasks_apart_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="named 'digits', as a task of this package"):
        run_fit(CONFIG, task=replace(own.table, name="digits"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_pictures")
def test_several_episodes_have_a_directory_each(tmp_path: Path) -> None:
    config = replace(CONFIG, max_epochs=1, episodes=2)
    results = train_heuristic(config, task=own.table, out=tmp_path / "runs", baseline=False)
    assert len(results) == 2
    assert {"episode-1", "episode-2", "config.json"} <= names(tmp_path / "runs")
    with pytest.raises(ValueError, match="one episode, got episodes=2; use train_heuristic"):
        run_heuristic_episode(config, task=own.table, out=tmp_path / "other")


def test_resume_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="name it with out="):
        run_fit(CONFIG, task=own.table, resume=True)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_goes_bad_leaves_its_directory(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=OptimConfig(host_lr=1e30))
    hub = TelemetryHub([recorder := Recorder()])
    with pytest.raises(NonFiniteLossError):
        run_fit(config, task=own.table, out=tmp_path / "run", hub=hub)
    assert read_metrics(tmp_path / "run")[-1]["status"] == "nonfinite"
    assert recorder.of(EventType.RUN_FINISHED)[0].data["status"] == "nonfinite"
    assert recorder.closed == 1


# what a task brings


def test_each_part_of_the_network_gets_the_tasks_own_optimizer() -> None:
    made: list[tuple[str, float, int]] = []

    def make(parameters: Sequence[nn.Parameter], lr: float, group: str) -> torch.optim.Optimizer:
        made.append((group, lr, len(parameters)))
        return torch.optim.Adagrad(parameters, lr=lr)

    task = replace(own.table, make_optimizer=make)
    optim = OptimConfig(host_lr=0.05, seed_lr=0.02)
    policy = Script(e1=germinate("early", "bottleneck"))
    run_heuristic_episode(replace(CONFIG, optim=optim), task=task, policy=policy)
    assert made == [("host", 0.05, 6), ("early", 0.02, 6)]
    wrong = replace(own.table, make_optimizer=lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="return a torch Optimizer for group 'host', got NoneType"):
        run_fit(CONFIG, task=wrong)


@pytest.mark.usefixtures("without_pictures")
def test_an_optimizer_of_ones_own_is_resumed(tmp_path: Path) -> None:
    task = replace(
        own.table, make_optimizer=lambda params, lr, group: torch.optim.NAdam(params, lr=lr)
    )
    schedule = ScheduleConfig(kind="cosine")
    config = replace(CONFIG, optim=OptimConfig(host_lr=0.01, schedule=schedule))
    whole = run_fit(config, task=task)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_fit(config, task=task, out=out, hub=TelemetryHub([StopAfter(2)]))
    resumed = run_fit(config, task=task, out=out, resume=True)
    weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert whole.accuracy == resumed.accuracy


class StopAfter(Recorder):
    """Ends the run after an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def write(self, event: Any) -> None:
        if event.type is EventType.EPOCH and event.epoch == self.epoch + 1:
            raise KeyboardInterrupt


def test_a_criterion_of_ones_own_is_what_is_learned() -> None:
    """The first epoch's loss is the criterion's mean over the batches, by torch."""
    seen: list[Tensor] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.multi_margin_loss(logits, targets)
        if loss.requires_grad:
            seen.append(loss.detach())
        return loss

    recorder = Recorder()
    run_fit(
        replace(CONFIG, max_epochs=1),
        task=replace(own.table, criterion=criterion),
        hub=TelemetryHub([recorder]),
    )
    (epoch,) = recorder.of(EventType.EPOCH)
    assert len(seen) == 4
    assert epoch.data["train"]["loss"] == pytest.approx(float(torch.stack(seen).mean()))


def test_an_nn_cross_entropy_is_fused() -> None:
    recorder = Recorder()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = replace(own.table, criterion=criterion)
    run_fit(replace(CONFIG, max_epochs=1), task=task, hub=TelemetryHub([recorder]))
    assert "criterion" not in recorder.of(EventType.RUN_STARTED)[0].data["backend"]


def test_the_loss_reward_needs_a_loss_of_guessing() -> None:
    task = replace(own.table, criterion=nn.MultiMarginLoss())
    with pytest.raises(ValueError, match="not known for a criterion of one's own; use 'shaped'"):
        run_fit(replace(CONFIG, reward="loss"), task=task)


def test_training_batches_are_augmented_and_no_others() -> None:
    seen: list[int] = []

    def flip(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(inputs))
        return -inputs, targets

    task = replace(own.table, augment=flip)
    flipped = run_fit(replace(CONFIG, max_epochs=1), task=task)
    assert seen == [8, 8, 8, 8]
    splits = own.load_table()
    inputs, targets = own.load_table().train  # type: ignore[misc]
    by_hand = replace(own.table, load=lambda: replace(splits, train=(-inputs, targets)))
    expected = run_fit(replace(CONFIG, max_epochs=1), task=by_hand)
    assert flipped.accuracy == expected.accuracy
    assert flipped.test.loss == expected.test.loss


def test_a_loader_that_cannot_promise_is_reported() -> None:
    inputs, targets = own.table_data(32)
    batches = list(zip(inputs.split(8), targets.split(8), strict=True))
    splits = own.load_table()
    task = replace(own.table, load=lambda: replace(splits, train=batches))
    recorder = Recorder()
    run_fit(replace(CONFIG, max_epochs=1), task=task, hub=TelemetryHub([recorder]))
    (warning,) = recorder.of(EventType.INEXACT_RESUME)
    assert warning.data["split"] == "train"
    assert "a resumed run may get other train batches" in warning.data["message"]
    assert "list has no state_dict" in warning.data["message"]


def named(splits: Splits) -> Splits:
    """The same batches as dicts with names of their own."""

    def batches(split: Any) -> list[dict[str, Tensor]]:
        parts = (part.split(8) for part in split)
        return [{"row": x, "kind": t} for x, t in zip(*parts, strict=True)]

    return Splits(**{name: batches(getattr(splits, name)) for name in SPLITS})


def test_any_batch_is_read_by_the_tasks_own_function() -> None:
    """Equal to a run on the same batches as pairs."""
    config = replace(CONFIG, evaluation_batch=8)
    pairs = replace(own.load_table(), train=list(own_batches(own.load_table().train)))
    plain = run_fit(config, task=replace(own.table, load=lambda: pairs))
    task = replace(
        own.table,
        load=lambda: named(own.load_table()),
        batch=lambda batch: (batch["row"], batch["kind"]),
    )
    result = run_fit(config, task=task)
    assert result.test.loss == plain.test.loss
    assert result.accuracy == plain.accuracy
    grown = run_heuristic_episode(config, task=task, policy=Script(e1=germinate("early", "norm")))
    assert grown.action_counts["GERMINATE"] == 1
    with pytest.raises(TypeError, match="takes its inputs as one tensor, got a dict with 'row'"):
        run_fit(config, task=replace(task, batch=lambda batch: (batch, batch["kind"])))


def own_batches(split: Any) -> Any:
    inputs, targets = split
    return zip(inputs.split(8), targets.split(8), strict=True)


def test_a_forward_of_ones_own_trains_the_host_alone() -> None:
    def halved(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs / 2)

    task = replace(own.table, forward=halved)
    with pytest.raises(ValueError, match="write it into the host's segments, or train the host al"):
        run_heuristic_episode(CONFIG, task=task)
    splits = own.load_table()
    halves = {n: (getattr(splits, n)[0] / 2, getattr(splits, n)[1]) for n in SPLITS}
    expected = run_fit(CONFIG, task=replace(own.table, load=lambda: Splits(**halves)))
    assert run_fit(CONFIG, task=task).test.loss == expected.test.loss


def test_a_regression_trains_its_host_alone() -> None:
    def load() -> Splits:
        inputs, _ = own.table_data()
        data = inputs, inputs[:, :3].sum(1, keepdim=True).expand(-1, 3).contiguous()
        return Splits(train=data, validation=data, test=data)

    task = replace(
        own.table,
        task_type="regression",
        num_classes=None,
        load=load,
        criterion=nn.MSELoss(),
    )
    config = replace(CONFIG, max_epochs=20, optim=OptimConfig(host_lr=0.05), keep="best")
    result = run_fit(config, task=task)
    assert result.test.loss < 1.0 < float(load().train[1].var())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"judged by accuracy.*run_fit"):
        run_heuristic_episode(CONFIG, task=task)


# hosts of one's own


@pytest.mark.parametrize("blueprint", ["bottleneck", "gated", "norm", "doubled"])
def test_a_perceptron_grows(blueprint: str) -> None:
    config = replace(CONFIG, max_epochs=12)
    policy = Script(e1=germinate("early", blueprint))
    result = run_heuristic_episode(config, task=own.table, policy=policy)
    assert result.model.slot("early").state.stage.name == "PROBATIONARY"
    assert result.action_counts["GERMINATE"] == 1
    assert not result.refused


def test_a_residual_network_grows() -> None:
    config = replace(CONFIG, max_epochs=12, slots=("one", "two"))
    policy = Script(e1=germinate("two", "conv_light"))
    result = run_heuristic_episode(config, task=own.images, policy=policy)
    assert result.model.slot("two").state.stage.name == "PROBATIONARY"


def test_default_slots_that_a_host_lacks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'early'.*Known: one, two"):
        run_heuristic_episode(RunConfig(max_epochs=1), task=own.images)


def test_a_host_with_fewer_classes_than_the_task_is_refused() -> None:
    task = replace(own.table, num_classes=7)
    with pytest.raises(ValueError, match=r"num_classes=7.*logits \[2, 3\], for 3 classes"):
        run_fit(CONFIG, task=task)


def test_a_step_schedule_needs_the_length_of_an_epoch() -> None:
    class Sized:
        def __iter__(self) -> Any:
            inputs, targets = own.table_data(32)
            return iter(zip(inputs.split(8), targets.split(8), strict=True))

    task = replace(own.table, load=lambda: replace(own.load_table(), train=Sized()))
    schedule = ScheduleConfig(kind="cosine", each="step")
    config = replace(CONFIG, max_epochs=1, optim=OptimConfig(schedule=schedule))
    with pytest.raises(ValueError, match="the training loader has no length; set max_batches"):
        run_fit(config, task=task)
    run_fit(replace(config, max_batches=3), task=task)
