"""Directories of runs that earlier versions wrote: reported, resumed and loaded, or refused with
the reason.

Accuracies in metrics and checkpoints were percentages when those of results were, and still are.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train import cli, load_run
from esper_train.run.checkpoint import save, saved
from esper_train.run.directory import read_metrics
from tests.helpers.growing_run import reported, resume
from tests.helpers.stopped import stopped_after

# what the version before wrote for a run of 1 epoch; numbers as it wrote them, gradients left out
OLD = """
{"event": "run_started", "epoch": 0, "mode": "heuristic", "task": "synthetic", "seed": 42, \
"max_epochs": 1, "device": "cpu", "backend": "eager", "slots": ["early"], "data": {}, \
"host_parameters": 1009}
{"event": "epoch", "epoch": 1, "train": {"loss": 2.467492372418443, "accuracy": \
9.895833333333332, "correct": {"1": 19}, "valid": 192, "compiled": false, "compile_failure": null, \
"replayed": 0, "not_replayed": {}}, "validation": {"loss": 2.285838662646711, "accuracy": \
11.71875, "correct": {"1": 30}, "valid": 256}, "grad": null, "slots": [{"slot": "early", \
"stage": "DORMANT", \
"seed_id": null, "blueprint": null, "blend": null, "alpha": 0.0, "epochs_in_stage": 2, \
"previous_stage": null, "previous_epochs_in_stage": 0, "epochs_alive": 0, "seed_parameters": 0, \
"accuracy": 11.71875, "accuracy_at_germination": null, "accuracy_at_stage_start": 12.5, \
"contribution": null, "gradient_ratio": null}], "decision": {"op": "WAIT", "slot": null, \
"blueprint": null, "blend": null, "reason": "before epoch 5", "confidence": 1.0}, "seconds": \
0.058, "joint": null, "refused": null, "max_epochs": 1, "reward": 0.0, \
"reward_parts": {"final": 0.0}}
{"event": "run_finished", "epoch": 1, "status": "completed", "error": null, "test": {"loss": \
1.7611439439933747, "accuracy": 36.328125, "correct": {"1": 93}, "valid": 256}, "accuracy": \
11.71875, "parameters": 1009, "fossils": 0, "contributions": [], "action_counts": {"WAIT": 1, \
"GERMINATE": 0, "CULL": 0, "FOSSILIZE": 0}, "rewards": [0.0], "seconds": 1.1640613380004652}
""".replace("\\\n", "")


def changed(path: Path, change: Any) -> None:
    """A checkpoint with another content."""
    state = torch.load(path, weights_only=True)
    change(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    save(path, buffer.getvalue())


def config_without(directory: Path, *names: str, **more: Any) -> None:
    """`config.json` as an earlier version wrote it, which had no digest."""
    values = json.loads((directory / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in names}
    for table, settings in more.items():
        values[table] |= settings
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "config.json.sha256").unlink(missing_ok=True)


def test_percentages_of_an_old_run_are_reported_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(OLD.lstrip())
    assert cli.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for figure in ("36.33%", "11.72%", "1,009"):
        assert figure in page
    assert "In epoch" not in page


def test_metrics_and_checkpoints_keep_the_unit_of_old_ones(whole: Path) -> None:
    """Metrics and checkpoints of both versions are read alike, and may follow each other in one
    file."""
    *_, last = (event for event in read_metrics(whole) if event["event"] == "epoch")
    finished = read_metrics(whole)[-1]
    for measures in (last["train"], last["validation"], finished["test"]):
        right = measures["correct"]["1"] / measures["valid"]
        assert measures["accuracy"] == pytest.approx(100 * right)
    newest = torch.load(saved(whole / "checkpoints")[-1], weights_only=True)
    assert newest["parts"]["episode"]["accuracy"] == last["validation"]["accuracy"]
    assert newest["parts"]["tracker"]["_previous"][1] == last["validation"]["accuracy"]


@pytest.mark.usefixtures("without_pictures")
def test_a_run_of_the_version_before_is_resumed_and_loaded(whole: Path, tmp_path: Path) -> None:
    """It had no state of loaders, no size of the metrics, no digests, and fewer settings."""
    directory = stopped_after(7, whole, tmp_path / "run")

    def older(state: dict[str, Any]) -> None:
        del state["parts"]["sources"]
        del state["metrics"]
        del state["run"]["keep"]

    for path in saved(directory / "checkpoints"):
        changed(path, older)
    config_without(directory, "keep", "channels_last")
    (directory / "network.pt.sha256").unlink()
    ours, theirs = (load_run(path).state_dict() for path in (directory, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_with_settings_or_a_format_that_are_gone_is_refused_with_a_way_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    newest = saved(directory / "checkpoints")[-1]
    changed(newest, lambda state: state.update(format=1))
    assert resume(directory) == 2
    assert "expected format 2, got 1" in capsys.readouterr().err
    config_without(directory, growth={"blending_improvement": 0.5})
    words = (
        "config.json does not fit this version: unknown config key 'growth.blending_improvement'"
    )
    with pytest.raises(ValueError, match=rf"{words}.*environment.json beside it says"):
        load_run(directory)
    assert resume(directory) == 2
    assert words in capsys.readouterr().err
    assert len(read_metrics(directory)) == len(read_metrics(whole))
