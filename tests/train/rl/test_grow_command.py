"""`esper-train ppo` and `esper-train grow --policy`, as a user meets them."""

import json
import sys
from pathlib import Path

import pytest

from esper_train import cli
from esper_train.run.directory import read_metrics
from tests.helpers.command import QUICK, fails

PPO = [
    *QUICK,
    *("--rl.hosts", "2", "--rl.rollout", "4", "--rl.batch", "8", "--rl.passes", "1"),
    *("--rl.evaluate-every", "0", "--rl.evaluations", "1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ppo") / "training"
    assert cli.main(["ppo", *PPO, "--rl.steps", "8", "--out", str(out)]) == 0
    return out


def test_a_policy_is_trained_resumed_and_grows_a_network(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ppo", "--resume", str(trained), "--rl.steps", "16"]) == 0
    printed = capsys.readouterr().out
    assert "resuming after update 1, 8 steps" in printed
    assert f"policy: {trained / 'policy.pt'}" in printed
    run = tmp_path / "run"
    policy = str(trained / "policy.pt")
    assert cli.main(["grow", *QUICK, "--policy", policy, "--out", str(run)]) == 0
    started, *epochs, finished = read_metrics(run)
    assert started["policy"] == "LearnedPolicy"
    decided = [each["decision"] for each in epochs if each["event"] == "epoch"]
    assert all(sum(d["probabilities"].values()) == pytest.approx(1.0) for d in decided)
    assert finished["cost"] >= 3.0
    assert (run / "policy.pt").read_bytes() != b""
    assert not (run / "baseline" / "policy.pt").exists()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Probability of each action over epochs" in page
    assert cli.main(["grow", "--resume", str(run), "--max-epochs", "5"]) == 0
    resumed = [each for each in read_metrics(run) if each["event"] == "epoch"]
    assert len(resumed) == 5
    assert resumed[-1]["decision"]["probabilities"] is not None


def test_a_report_compares_controllers(trained: Path, tmp_path: Path) -> None:
    policy = str(trained / "policy.pt")
    for name, options in (("learned", ["--policy", policy]), ("heuristic", [])):
        out = str(tmp_path / name)
        assert cli.main(["grow", *QUICK, *options, "--no-baseline", "--out", out]) == 0
    page = tmp_path / "comparison.html"
    runs = [str(tmp_path / name) for name in ("learned", "heuristic")]
    assert cli.main(["report", *runs, "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for expected in (
        "Decisions and what they earned",
        "LearnedPolicy",
        "HeuristicTamiyo",
        "attribution",
        "training cost",
        "Decisions of each run over epochs",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grow", *QUICK, "--policy", "missing.pt"], "missing.pt"),
        (["fit", *QUICK, "--policy", "policy.pt"], "--policy is for a new run of `grow`"),
        (["ppo", *PPO, "--policy", "policy.pt"], "for other commands than ppo"),
        (["grow", *QUICK, "--policy=wrong.pt"], "wrong.pt cannot be used as a policy"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.pt").write_text("no policy")
    code, text = fails(capsys, *arguments)
    assert code == 2
    assert message in text
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.pt"]


def test_a_policy_of_other_slots_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = str(trained / "policy.pt")
    out = tmp_path / "run"
    arguments = ["grow", *QUICK, "--slots", "early", "--policy", policy, "--out", str(out)]
    code, text = fails(capsys, *arguments)
    assert code == 2
    assert "trained for slots early, mid, late, and this run has early" in text
    assert not out.exists()


def test_without_the_extra_the_command_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    code, text = fails(capsys, "ppo", *PPO, "--out", str(tmp_path / "run"))
    assert code == 2
    assert "needs stable_baselines3: pip install 'esper-kernels[rl]'" in text
    assert not (tmp_path / "run").exists()


def test_settings_of_ppo_are_in_its_config(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert config["rl"]["rollout"] == 4
