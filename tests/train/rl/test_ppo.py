"""PPO: it learns what pays, resumes bit for bit, and leaves nothing that is unpickled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from esper_train import HostConfig, RunConfig
from esper_train.rl import ppo
from esper_train.rl.config import RLConfig
from esper_train.rl.learned import load_policy
from esper_train.rl.ppo import train_ppo
from tests.helpers.episodes import SHORT
from tests.helpers.scripted import EASY

RL = RLConfig(
    hosts=2, steps=24, rollout=4, batch=4, passes=2, width=8, evaluate_every=2, evaluations=1
)
CONFIG = replace(SHORT, growth=EASY, max_epochs=5, max_batches=1, rl=RL)
"""A rollout ends within an episode."""


def lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "progress.jsonl").read_text(encoding="utf-8")
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()
    ]


def with_rl(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, rl=replace(config.rl, **changes))


def test_a_resumed_training_is_the_one_that_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected_draw = torch.rand(2)
    torch.manual_seed(11)
    whole = train_ppo(CONFIG, tmp_path / "whole")
    assert torch.equal(torch.rand(2), expected_draw)  # the caller's random numbers are its own
    said: list[str] = []
    train_ppo(with_rl(CONFIG, steps=8), tmp_path / "half")
    numpy.random.rand(5)
    resumed = train_ppo(CONFIG, tmp_path / "half", resume=True, say=said.append)
    assert said[0] == "resuming after update 1, 8 steps"
    assert resumed.spaces == whole.spaces
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name
    # the end of the first half was evaluated too
    assert lines(tmp_path / "half")[1:] == lines(tmp_path / "whole")[1:]
    last = [
        torch.load(tmp_path / each / "checkpoints/update-3.pt", weights_only=True)
        for each in ("half", "whole")
    ]
    for name in ("policy", "optimizer", "observations", "random"):
        assert str(last[0][name]) == str(last[1][name])


def test_what_training_leaves_is_tensors_and_plain_values(tmp_path: Path) -> None:
    policy = train_ppo(CONFIG, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "checkpoints",
        "config.json",
        "config.json.sha256",
        "environment.json",
        "policy.pt",
        "progress.jsonl",
    ]
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [line["evaluation"] is not None for line in lines(tmp_path)] == [False, True, True]
    assert lines(tmp_path)[-1]["steps"] == 24
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == ["update-2.pt", "update-3.pt"]
    read = load_policy(tmp_path / "policy.pt")
    assert read.spaces == policy.spaces
    assert (read.spaces.task, read.spaces.steps, read.spaces.max_epochs) == ("synthetic", 24, 5)


def test_a_training_is_resumed_with_its_own_settings_only(tmp_path: Path) -> None:
    train_ppo(with_rl(CONFIG, steps=8), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"host.width was None and is 5; .* may change rl.steps"):
        train_ppo(replace(CONFIG, host=HostConfig(width=5)), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"rl.hosts was 2 and is 3"):
        train_ppo(with_rl(CONFIG, hosts=3), tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        train_ppo(CONFIG, tmp_path)
    (tmp_path / "checkpoints/update-1.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"update-1.pt cannot be used: .*start the run anew"):
        train_ppo(CONFIG, tmp_path, resume=True)
    (tmp_path / "checkpoints/update-1.pt").write_bytes(before[tmp_path / "checkpoints/update-1.pt"])
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_seeds_of_hosts_and_evaluations_never_meet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 1000 together.*got 999 and 2"):
        train_ppo(with_rl(CONFIG, hosts=999, evaluations=2), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = with_rl(CONFIG, tensorboard=True, evaluate_every=0)
    train_ppo(with_rl(config, steps=16), tmp_path)
    train_ppo(config, tmp_path, resume=True)
    assert [line["steps"] for line in lines(tmp_path)] == [8, 16, 24]
    curves = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    for name in ("rollout/ep_rew_mean", "train/value_loss", "train/approx_kl"):
        assert name in curves.Tags()["scalars"]
    losses = curves.Scalars("train/value_loss")
    assert [event.step for event in losses] == [8, 16, 24]
    found = [line["value_loss"] for line in lines(tmp_path)]
    assert [event.value for event in losses] == pytest.approx(found)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ppo_learns_what_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that pays for one germination alone teaches the policy to ask for it."""
    paid = {
        "shaped": lambda op, state, signals, host: {
            "paid": float(op.name == "GERMINATE" and signals.epoch == 3)
        }
    }
    monkeypatch.setattr("esper_train.run.execute.REWARDS", paid)
    config = with_rl(CONFIG, hosts=4, steps=960, rollout=20, batch=20, passes=8, evaluate_every=0)
    train_ppo(config, tmp_path)
    found = lines(tmp_path)
    assert found[-1]["evaluation"]["return"] == 1.0
    assert found[-1]["return"] > found[0]["return"]


def test_an_update_cut_off_before_its_checkpoint_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`progress.jsonl` and TensorBoard read as if the training had never stopped."""
    tensorboard = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    config = with_rl(CONFIG, steps=16, tensorboard=True)
    train_ppo(config, tmp_path / "whole")
    inner = ppo.save

    def save_one(path: Path, data: bytes) -> None:
        if path.stem == "update-2":
            raise OSError("the disk went away")
        inner(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save", save_one)
        with pytest.raises(OSError, match="the disk went away"):
            train_ppo(config, tmp_path / "run")
    assert [line["update"] for line in lines(tmp_path / "run")] == [1, 2]
    train_ppo(config, tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    steps = {}
    for name in ("whole", "run"):
        curves = tensorboard.EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        steps[name] = [event.step for event in curves.Scalars("time/fps")]
    assert steps["run"] == steps["whole"]


def test_a_report_that_lost_lines_is_refused(tmp_path: Path) -> None:
    train_ppo(with_rl(CONFIG, steps=16), tmp_path)
    (tmp_path / "progress.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"progress.jsonl has 0 bytes .* last lines are lost"):
        train_ppo(CONFIG, tmp_path, resume=True)
