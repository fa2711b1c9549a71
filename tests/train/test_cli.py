"""The command as a user meets it: run directories, exit codes, messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch

from esper_train import GrowthConfig, cli, load_run
from esper_train.run.directory import read_metrics
from tests.helpers.command import QUICK, fails


def test_heuristic_leaves_a_whole_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["heuristic", *QUICK, "--out", str(out)]) == 0
    names = {
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "network.pt",
        "report.html",
    }
    names |= {"config.json.sha256", "network.pt.sha256"}
    assert {p.name for p in out.iterdir()} == names | {"baseline"}
    assert {p.name for p in (out / "baseline").iterdir()} == names
    events = read_metrics(out)
    assert [e["event"] for e in events] == [
        "run_started",
        "epoch",
        "epoch",
        "epoch",
        "run_finished",
    ]
    assert events[-1]["status"] == "completed"
    assert read_metrics(out / "baseline")[0]["mode"] == "fit"
    model = load_run(out)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    printed = capsys.readouterr().out
    assert "epoch   3/3" in printed
    assert f"report: {out / 'report.html'}" in printed


def test_fit_has_no_slots_and_no_baseline(tmp_path: Path) -> None:
    assert cli.main(["fit", *QUICK, "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "baseline").exists()
    assert read_metrics(tmp_path / "run")[0]["slots"] == []


def test_profile_says_where_the_time_goes_and_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    for name, options in (("profiled", ["--profile"]), ("plain", [])):
        arguments = ["heuristic", *QUICK, "--no-baseline", *options, "--out", str(tmp_path / name)]
        assert cli.main(arguments) == 0
    table = (tmp_path / "profiled" / "profile.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    parts = ["data", "forward", "loss", "backward", "statistics", "optimizer", "evaluation"]
    assert [row[0].strip() for row in rows] == parts
    assert all(float(row[1]) > 0 for row in rows)
    assert sum(float(row[2].strip().rstrip("%")) for row in rows) == pytest.approx(100, abs=4)
    trace = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert set(parts) <= {event.get("name") for event in trace["traceEvents"]}
    profiled, plain = (read_metrics(tmp_path / name) for name in ("profiled", "plain"))
    for mine, theirs in zip(profiled[1:4], plain[1:4], strict=True):
        assert mine["train"] | {"seconds": 0} == theirs["train"] | {"seconds": 0}
    assert not (tmp_path / "plain" / "profile.md").exists()


def test_episodes_get_a_directory_each(tmp_path: Path) -> None:
    arguments = [
        "heuristic",
        *QUICK,
        "--episodes",
        "2",
        "--seed",
        "5",
        "--no-baseline",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(arguments) == 0
    seeds = [read_metrics(tmp_path / "run" / f"episode-{i}")[0]["seed"] for i in (1, 2)]
    assert seeds == [5, 1005]


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'task = "synthetic"\nmax_epochs = 2\nmax_batches = 1\nseed = 9\n[optim]\nhost_lr = 0.5\n'
    )
    out = tmp_path / "run"
    assert (
        cli.main(
            ["fit", "--config", str(file), "--seed", "3", "--backend", "eager", "--out", str(out)]
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["max_epochs"], config["seed"], config["optim"]["host_lr"]) == (2, 3, 0.5)
    assert config["train"]["kernel"]["backend"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["growing"], "unknown command 'growing'; perhaps 'grow'?"),
        (["grow", *QUICK, "--max-epochs", "0"], "Error parsing Options: max_epochs must be"),
        (["fit", "--task", "digit"], "unknown task 'digit'; perhaps 'digits'?"),
        (["heuristic", *QUICK, "--slots", "early", "middle"], "'middle'"),
        (["heuristic", *QUICK, "--slots"], "no slots"),
        (["heuristic", *QUICK, "--policy.blueprints", "conv_lite"], "'conv_lite'"),
        (["heuristic", *QUICK, "--policy.blend", "sigmoidal"], "perhaps 'sigmoid'"),
        (
            ["fit", *QUICK, "--device", "cuda:42"],
            "device 'cuda:42' does not exist here; usable: cpu",
        ),
        (["fit", *QUICK, "--backend", "cuda"], "cuda"),
        (["fit", *QUICK, "--sed", "3"], "--seed"),
        (["fit", "--max-batches", "0"], "max_batches must be at least 1"),
        (["fit", *QUICK, "--seed", str(2**64)], "seed must be at least -2**63"),
        (
            ["fit", *QUICK, "--seed", str(2**63 - 1500), "--episodes", "3"],
            "seed must be at least -2**63",
        ),
        (["fit", *QUICK, "--seed", str(-(2**63) - 1)], "seed must be at least -2**63"),
        (["fit", "--config", "no-such-file.toml"], "no-such-file.toml"),
        (["fit", *QUICK, "--resume", ""], "has no config.json"),  # as from an unset variable
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = fails(capsys, *arguments)
    assert code == 2
    assert message in text
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left behind


def test_an_empty_out_is_the_directory_that_we_are_in_and_no_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    code, text = fails(capsys, "fit", *QUICK, "--out", "")
    assert code == 2
    assert "exists and is not empty" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("max_epoch = 3", "unknown config key 'max_epoch'; perhaps 'max_epochs'?"),
        ("[train.grad]\nevry = 2", "'train.grad.evry'; perhaps 'train.grad.every'?"),
        ("max_epochs = 'many'", "'max_epochs' takes int, got 'many'"),
        ("max_epochs = ", "not valid TOML"),
    ],
)
def test_bad_config_files_are_refused(
    toml: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(toml)
    code, text = fails(
        capsys, "fit", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")
    )
    assert code == 2
    assert message in text
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_no_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    code, text = fails(capsys, "fit", "--config", str(tmp_path / "run.toml"))
    assert code == 2
    assert f"{tmp_path / 'run.toml'} is not valid TOML" in text


def test_a_compiler_that_nobody_knows_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--train.compile.enabled",
        "--train.compile.backend",
        "nope",
        "--out",
        str(tmp_path / "run"),
    ]
    code, text = fails(capsys, "fit", *QUICK, *options)
    assert code == 2
    assert "nope" in text


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, text = fails(capsys, "fit", *QUICK, "--out", str(tmp_path / "run"))
    assert code == 2
    assert "not empty" in text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_diverging_run_ends_with_its_own_code_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "fit",
        "--task",
        "synthetic",
        "--optim.host-lr",
        "1e30",
        "--out",
        str(tmp_path / "run"),
    ]
    code, text = fails(capsys, *arguments)
    assert code == 3
    assert "the loss is not finite" in text
    events = read_metrics(tmp_path / "run")
    assert "nonfinite" in [e["event"] for e in events]
    assert events[-1]["event"] == "run_finished"
    assert "nonfinite" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_logger_is_refused_before_anything_is_made(
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, text = fails(
        capsys, "fit", *QUICK, f"--telemetry.{package}", "--out", str(tmp_path / "run")
    )
    assert code == 2
    assert (
        f"telemetry.{package} needs the package {package}: pip install 'esper-kernels[log]'" in text
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_a_readable_directory_and_130(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = "import sys; from esper_train.cli import main; sys.exit(main())"
    arguments = ["heuristic", "--task", "synthetic", "--max-epochs", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while (
            not (out / "metrics.jsonl").exists()
            or (out / "metrics.jsonl").read_text().count("\n") < 3
        ):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert read_metrics(out)[-1]["status"] == "interrupted"
    assert "interrupted" in (out / "report.html").read_text()
    assert load_run(out)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_one_process_of_several_ends_without_shutting_python_down() -> None:
    """Threads of gloo that free a tensor while Python shuts down would abort it."""
    code = (
        "import atexit, sys; from esper_train.cli import main; "
        "atexit.register(print, 'shut down'); sys.exit(main())"
    )
    command = [sys.executable, "-c", code]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    several = {**one, "RANK": "0", "WORLD_SIZE": "1"}
    for environment, argument, expected in [
        (one, "--version", (0, True)),
        (several, "--version", (0, False)),
        (several, "no-such-command", (2, False)),
    ]:
        done = subprocess.run([*command, argument], env=environment, capture_output=True, text=True)
        assert (done.returncode, "shut down" in done.stdout) == expected
        assert "esper-train" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_main_job_fossilizes_a_seed_and_the_report_shows_it(tmp_path: Path) -> None:
    """One run in about ten keeps no seed, and which one depends on the last bits of the machine:
    three are tried."""
    for seed in (42, 43, 44):
        out = tmp_path / f"run-{seed}"
        assert cli.main(["heuristic", "--no-baseline", "--seed", str(seed), "--out", str(out)]) == 0
        kept = [
            e
            for e in read_metrics(out)
            if e["event"] == "seed_stage" and e["stage"] == "FOSSILIZED"
        ]
        if kept:
            break
    assert kept
    least = GrowthConfig().fossilize_contribution
    assert all(fmean(e["contributions"]) >= least for e in kept)
    page = (out / "report.html").read_text()
    assert all(e["seed_id"] in page and f"{e['contribution']:+.2f}" in page for e in kept)
