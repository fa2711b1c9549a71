"""A task of one's own is a full run: a directory with all that the command leaves, resumed, loaded,
and refused under another name."""

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from esper_train import (
    EventType,
    NonFiniteLossError,
    OptimConfig,
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
from tests.helpers.own import CONFIG, SLOTS
from tests.helpers.scripted import Recorder, StopAfter

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
@pytest.mark.parametrize(
    "task", [own.table, own.sampled, own.augmented, own.shuffled], ids=lambda task: task.name
)
def test_a_resumed_run_ends_as_one_that_never_stopped(task: Task, tmp_path: Path) -> None:
    """The run is stopped in the third epoch. Noise comes from samples, from `augment`, or from
    torch's own loader, whose batches go on where they were."""
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
        (
            "tests.helpers.own:nothing",
            "has no 'nothing'; tasks in it: table, sampled, augm",
        ),
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


@pytest.mark.usefixtures("without_pictures")
def test_a_random_split_is_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    """`load` draws from the run's seed, whatever its caller drew before."""
    drawn: list[Any] = []

    def load() -> Splits:
        inputs, targets = own.table_data()
        order = torch.randperm(96)
        drawn.append((order.tolist(), random.random(), float(numpy.random.rand())))
        parts = (part[order].split(32) for part in (inputs, targets))
        train, validation, test = zip(*parts, strict=True)
        return Splits(train=train, validation=validation, test=test)

    task = replace(own.table, load=load)
    config = replace(CONFIG, max_epochs=1)
    run_fit(config, task=task, out=tmp_path / "run")
    torch.randn(1)
    run_fit(replace(config, max_epochs=2), task=task, out=tmp_path / "run", resume=True)
    run_fit(replace(config, seed=1), task=task)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_without_matplotlib_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need matplotlib: pip install 'esper-kernels\[train\]'"):
        run_fit(CONFIG, task=own.table, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("start", [run_fit, run_heuristic_episode, train_heuristic])
def test_a_directory_that_holds_no_run_is_not_resumed(start: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no run to resume.*config.json, but notes.txt"):
        start(CONFIG, task=own.table, out=tmp_path, resume=True)
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_a_host_that_is_no_host_is_named() -> None:
    task = replace(own.table, build_host=lambda config: torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="task 'table': expected build_host to return a Host"):
        run_fit(CONFIG, task=task)


@pytest.mark.parametrize("start", [run_fit, run_heuristic_episode, train_heuristic])
def test_what_is_no_config_is_refused(start: Any) -> None:
    with pytest.raises(TypeError, match="config must be of type RunConfig, got 'digits'"):
        start("digits")
    with pytest.raises(TypeError, match="task must be of type Task or None, got 'digits'"):
        start(CONFIG, task="digits")
