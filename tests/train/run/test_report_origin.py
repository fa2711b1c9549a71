"""The lines of a report about how its run was made."""

import json
import sys
from pathlib import Path

import pytest
import torch

from esper_train import OptimConfig, RunConfig
from esper_train.run.directory import create
from esper_train.run.report import write_report
from tests.helpers.reports import HOSTILE, Page, grown, write

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("blank_pictures")
CONFIG = RunConfig(task="synthetic", slots=("early",), optim=OptimConfig(host_lr=0.5))


def page_of(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


def test_the_page_has_the_command_the_versions_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["esper-train", "grow", "--out", "my run"])
    write(tmp_path, *grown())
    create(tmp_path, CONFIG)
    shown = page_of(tmp_path)
    assert shown.row("command") == ["esper-train grow --out 'my run'"]
    assert shown.row("torch") == [torch.__version__]
    assert shown.row("slots") == ["('early', 'mid', 'late')", "('early',)"]
    assert shown.row("optim.host_lr") == ["0.01", "0.5"]
    assert not any(row[0] == "seed" and len(row) == 3 for row in shown.rows if row)


@pytest.mark.parametrize("environment", ["", "[1]", json.dumps({"command": HOSTILE})])
def test_damaged_and_hostile_environments_do_no_harm(tmp_path: Path, environment: str) -> None:
    write(tmp_path, *grown())
    create(tmp_path, CONFIG)
    (tmp_path / "environment.json").write_text(environment)
    shown = page_of(tmp_path)
    assert "How it was made" in shown.text
    assert shown.tags["script"] == 0
    assert ("alert(1)" in shown.text) == (HOSTILE in environment.replace("\\", ""))
