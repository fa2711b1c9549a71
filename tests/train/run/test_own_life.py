"""The whole life of the README's task, by the README's commands: grown, killed, resumed, reported,
loaded, exported, and loaded again without our packages."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esper_train import load_run
from esper_train.run.checkpoint import saved
from esper_train.run.directory import read_metrics
from esper_train.tasks import import_task
from tests.helpers.growing_run import reported

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## Grow a network") : README.index("## How fast")]
MAIN = "import sys; from esper_train.cli import main; sys.exit(main())"
WITHOUT = """
import sys
sys.modules.update({"esper_kernels": None, "esper_train": None})
import torch
torch.set_num_threads(2)  # another number than in the run
program = torch.export.load("mine.pt2").module()
inputs, expected = torch.load("expected.pt")
torch.testing.assert_close(program(inputs), expected)
"""


def commands() -> list[list[str]]:
    """Arguments for this interpreter, of each command of the README."""
    found = []
    for line in re.findall(r"^\.venv/bin/(.*)$", SECTION, re.MULTILINE):
        program, *arguments = shlex.split(line, comments=True)
        found.append((["-c", MAIN] if program == "esper-train" else []) + arguments)
    return found


def begun(command: list[str], directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(command: list[str], directory: Path) -> str:
    """The standard error of a command that succeeds."""
    with begun(command, directory) as child:
        stderr = child.communicate(timeout=240)[1]
    assert child.returncode == 0, stderr
    return stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_task_of_the_readme_from_its_first_command_to_a_network_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[0]
    directories = [tmp_path / "whole", tmp_path / "killed"]
    for directory in directories:
        directory.mkdir()
        (directory / "mine.py").write_text(code)
    grow, resume, report, export = commands()
    done([*grow, "--no-baseline"], directories[0])
    whole, run = (directory / "runs" / "mine" for directory in directories)

    with begun(grow, directories[1]) as child:
        try:
            while child.poll() is None and not saved(run / "checkpoints"):
                time.sleep(0.01)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not (run / "network.pt").exists()
    done([*resume, "--no-baseline"], directories[1])
    assert reported(run) == reported(whole)
    stages = {e["stage"] for e in read_metrics(run) if e["event"] == "seed_stage"}
    assert {"GERMINATED", "TRAINING", "BLENDING"} <= stages

    (run / "report.html").unlink()
    done(report, directories[1])
    assert "mine, heuristic" in (run / "report.html").read_text()

    done(export, directories[1])
    monkeypatch.chdir(directories[1])
    monkeypatch.syspath_prepend(directories[1])
    task = import_task("mine:task")
    networks = [load_run(directory, task=task) for directory in (whole, run)]
    same = zip(*(network.parameters() for network in networks), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    inputs = torch.rand(6, 1, 8, 8)
    torch.save((inputs, networks[1](inputs)), "expected.pt")
    done(["-c", WITHOUT], directories[1])
