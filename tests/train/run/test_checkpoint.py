"""Checkpoints: what they hold, when they are written, and that random numbers continue."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from esper_train import Idle, RunConfig, TelemetryConfig, TelemetryHub
from esper_train.base.state import RandomState, copied
from esper_train.run import checkpoint
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Checkpoints, load, restore, saved
from esper_train.run.config import CheckpointConfig
from esper_train.run.directory import cut_back, load_config
from esper_train.run.run import prepare
from tests.helpers.growing_run import reported, resume, start
from tests.helpers.scripted import run_under
from tests.helpers.stopped import stopped_after

pytestmark = pytest.mark.usefixtures("without_pictures")


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
def test_schedules_and_the_loss_scale_go_on_where_they_were(kind: str, tmp_path: Path) -> None:
    """The scale overflows at first, a seed has a schedule of its own, and the number of workers
    changes."""
    options = [
        "--optim.schedule.kind",
        kind,
        "--train.amp.dtype",
        "float16",
        "--train.amp.init-scale",
        "1e9",
    ]
    options += ["--train.accumulate", "2", "--checkpoint.every", "1", "--checkpoint.keep", "99"]
    options += ["--max-epochs", "9"]
    assert start(tmp_path / "whole", *options) == 0
    directory = stopped_after(6, tmp_path / "whole", tmp_path / "run")
    assert resume(directory, "--workers", "1") == 0
    assert reported(directory) == reported(tmp_path / "whole")
    states = [
        load(d / "checkpoints" / "epoch-7.pt")["parts"] for d in (tmp_path / "whole", directory)
    ]
    assert 0 < states[0]["step"]["scale"] == states[1]["step"]["scale"] < 1e9
    for group in ("host", "early"):
        assert (
            states[0]["optimizers"][group]["schedule"] == states[1]["optimizers"][group]["schedule"]
        )


def test_a_checkpoint_holds_every_part_as_tensors_and_plain_values(whole: Path) -> None:
    state = torch.load(whole / "checkpoints" / "epoch-6.pt", weights_only=True)
    parts = {
        "episode",
        "model",
        "optimizers",
        "step",
        "tracker",
        "governor",
        "policy",
        "telemetry",
        "random",
    }
    parts |= {"streams", "trial", "kept", "sources", "cost"}
    assert set(state) == {"format", "run", "parts", "metrics"}
    assert set(state["parts"]) == parts
    assert {"python", "numpy", "torch", "order"} <= set(state["parts"]["random"])
    assert any(group.endswith(".gate") for group in state["parts"]["optimizers"])
    digest = (whole / "checkpoints" / "epoch-6.pt.sha256").read_text().split()
    data = (whole / "checkpoints" / "epoch-6.pt").read_bytes()
    # as `sha256sum --check` reads it
    assert digest == [hashlib.sha256(data).hexdigest(), "epoch-6.pt"]


def test_a_checkpoint_from_before_data_had_a_state_is_read(whole: Path) -> None:
    state = load(whole / "checkpoints" / "epoch-6.pt")
    del state["parts"]["sources"]
    del state["parts"]["cost"]
    episode = prepare(load_config(whole), "heuristic")
    restore(state, episode)
    assert episode.epoch == 6
    del state["parts"]["tracker"]
    with pytest.raises(ValueError, match="does not fit the run that was built: tracker: 'tracker'"):
        restore(state, episode)


def test_taking_checkpoints_changes_nothing(whole: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--checkpoint.every", "1000") == 0
    assert reported(tmp_path / "run") == reported(whole)
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-20.pt"]


def test_every_few_epochs_and_the_newest_are_kept(whole: Path, tmp_path: Path) -> None:
    """Leftovers of an earlier save that was killed are removed too."""
    options = ("--max-epochs", "8", "--checkpoint.every", "3", "--checkpoint.keep", "2")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "run" / "checkpoints" / ".epoch-5.pt.new").write_bytes(b"half")
    assert resume(tmp_path / "run", *options) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["epoch-6.pt", "epoch-6.pt.sha256", "epoch-8.pt", "epoch-8.pt.sha256"]


def test_other_data_is_refused() -> None:
    episode = build_episode(RunConfig(task="synthetic"), slots=())
    state = {"run": checkpoint._identity(episode)}
    episode.data_record = {"sha256": "of other data"}
    with pytest.raises(ValueError, match=r"data_record.sha256 was None and is of other data;"):
        restore(state, episode)


def test_a_setting_that_a_checkpoint_does_not_know_is_no_other_run() -> None:
    episode = build_episode(RunConfig(task="synthetic", evaluation_batch=64), slots=())
    run = checkpoint._identity(episode)
    parts = {name: part.state_dict() for name, part in checkpoint.parts(episode).items()}
    with pytest.raises(ValueError, match="evaluation_batch was 512 and is 64"):
        restore({"run": run | {"evaluation_batch": 512}, "parts": parts}, episode)
    del run["evaluation_batch"]
    restore({"run": run, "parts": parts}, episode)
    assert episode.epoch == 0


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_taken(tmp_path: Path) -> None:
    class Learner(Idle):
        STATE = ("weight",)
        weight = numpy.float64(0.5)  # pickled as an object of numpy's

    episode = build_episode(RunConfig(task="synthetic", max_epochs=1, max_batches=1), slots=())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(TypeError, match=r"tensors and plain values only, got .*0\.5"):
        run_under(episode, Learner(), mode="fit", checkpoints=checkpoints)
    assert saved(tmp_path) == []


def test_a_network_that_does_not_fit_is_refused(whole: Path) -> None:
    config = RunConfig(task="synthetic", max_epochs=20)
    state = load(saved(whole / "checkpoints")[-1])
    for slots, message in (
        (("early",), "expected slots"),
        (("early", "mid", "late"), "does not fit"),
    ):
        episode = build_episode(config, slots=slots)
        same = {**state, "run": checkpoint._identity(episode)}
        same["parts"] = {**state["parts"], "model": {}}
        with pytest.raises(ValueError, match=message):
            restore(same, episode)


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def test_random_numbers_go_on_where_they_were_and_the_callers_are_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = [draws(), draws()]
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    callers = [draws()]
    order = torch.Generator().manual_seed(3)
    first = RandomState(5, CPU, order)
    with first.active():
        draws()
        torch.rand(2, generator=order)
        state = first.state_dict()
        then = [draws(), torch.rand(2, generator=order).tolist()]
    other_order = torch.Generator()
    second = RandomState(99, CPU, other_order)
    second.load_state_dict(state)
    with second.active():
        assert [draws(), torch.rand(2, generator=other_order).tolist()] == then
    callers.append(draws())
    assert callers == expected


def test_a_seed_fixes_all_random_numbers() -> None:
    drawn = []
    for seed in (5, 5, -6):
        with RandomState(seed, CPU).active():
            drawn.append(draws())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_the_hub_stays_escalated() -> None:
    hubs = [TelemetryHub((), TelemetryConfig(escalation_epochs=3)) for _ in range(2)]
    hubs[0].escalate()
    hubs[0].tick()
    hubs[1].load_state_dict(hubs[0].state_dict())
    assert hubs[1].state_dict() == {"_escalated_epochs": 2}


def test_a_copy_does_not_follow_the_training() -> None:
    weight = torch.zeros(3)
    state = {"a": weight, "b": [1, {"c": weight}], "d": (1, "x", None)}
    taken = copied(state)
    weight += 1
    state["b"].append(2)  # type: ignore[union-attr]
    assert taken["a"].tolist() == [0, 0, 0]
    assert taken["b"][1]["c"].tolist() == [0, 0, 0]
    assert len(taken["b"]) == 2


def test_cut_back_keeps_what_was_reported_up_to_an_epoch(tmp_path: Path) -> None:
    events = [
        ("run_started", 0),
        ("epoch", 1),
        ("seed_stage", 1),
        ("epoch", 2),
        ("run_finished", 2),
    ]
    lines = [json.dumps({"event": event, "epoch": epoch}) for event, epoch in events]
    for epoch, kept in ((2, 4), (1, 3), (0, 0)):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "ep')
        cut_back(tmp_path, epoch)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:kept]


def test_config_of_checkpoints_is_checked() -> None:
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            CheckpointConfig(**wrong)
    assert replace(CheckpointConfig(), every=3).every == 3
