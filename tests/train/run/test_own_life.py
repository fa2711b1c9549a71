"""The whole life of the task in `examples/`: grown by the command, killed, resumed, reported,
loaded, exported, and loaded again without our packages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper_train import cli, export, load_run
from esper_train.run.checkpoint import saved
from esper_train.run.directory import read_metrics
from tests.helpers.growing_run import config_file, reported

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[3]
PLACE = "examples.own_task:task"
KILLED_AFTER = 5
KILL = f"""
import os, signal, sys
from esper_train.cli import main
from esper_train.run.checkpoint import Checkpoints

take = Checkpoints.take
def take_and_die(self, episode):
    take(self, episode)
    if episode.epoch == {KILLED_AFTER}:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.take = take_and_die
sys.exit(main())
"""
WITHOUT = """
import sys
sys.modules.update({"esper_kernels": None, "esper_train": None})
import torch
program = torch.export.load(sys.argv[1]).module()
inputs, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(inputs), expected)  # with another number of threads
"""


def test_an_own_task_from_the_first_command_to_a_network_without_us(tmp_path: Path) -> None:
    settings = ["--task", PLACE, "--config", config_file(tmp_path), "--no-baseline"]
    settings += ["--max-epochs", "14", "--checkpoint.every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def child(code: str, *arguments: str) -> int:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        return done.returncode

    main = "import sys; from esper_train.cli import main; sys.exit(main())"
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert child(main, "heuristic", *settings, "--out", str(whole)) == 0
    assert child(KILL, "heuristic", *settings, "--out", str(out)) == -signal.SIGKILL
    assert saved(out / "checkpoints")[-1].name == f"epoch-{KILLED_AFTER}.pt"
    assert not (out / "network.pt").exists()
    resume = ["--resume", str(out), "--no-baseline"]
    assert child(main, "heuristic", *resume) == cli.EXIT_USAGE  # the task is asked for again
    assert child(main, "heuristic", *resume, "--task", PLACE) == 0
    assert reported(out) == reported(whole)
    stages = {e["stage"] for e in read_metrics(out) if e["event"] == "seed_stage"}
    assert {"GERMINATED", "TRAINING", "BLENDING"} <= stages

    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert "shifted-digits, heuristic" in (out / "report.html").read_text()

    from examples.own_task import task

    network = load_run(out, task=task)
    inputs = torch.rand(6, 1, 8, 8)
    expected = network(inputs)
    same = zip(load_run(whole, task=task).parameters(), network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    torch.export.save(export(network, inputs), tmp_path / "network.pt2")  # type: ignore[arg-type]
    torch.save((inputs, expected), tmp_path / "expected.pt")
    assert child(WITHOUT, str(tmp_path / "network.pt2"), str(tmp_path / "expected.pt")) == 0
