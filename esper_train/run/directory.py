"""The directory of a run: what it was asked, where it ran, what it reported, and the network it trained."""

import io
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper_kernels
from esper_train.base.device import plain_defaults
from esper_train.base.settings import from_dict
from esper_train.config import RunConfig
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.tasks import Task, get_task

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
NETWORK, REPORT, CHECKPOINTS = "network.pt", "report.html", "checkpoints"
BASELINE = "baseline"
"""Directory of the same host trained without slots."""
FORMAT = 2
"""Version of the layout of `network.pt`."""


def create(path: Path, config: RunConfig, *, resume: bool = False) -> Path:
    """Make a run directory and write what the run was asked and where it runs.

    Raises `FileExistsError` if there is something at `path` already, unless `resume`: no run overwrites another.
    """
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another --out, or remove it")
    path.mkdir(parents=True, exist_ok=True)
    environment = {
        "esper": esper_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": config.device,
    }
    for name, values in ((CONFIG, asdict(config)), (ENVIRONMENT, environment)):
        write_file(path / name, (json.dumps(values, indent=2) + "\n").encode())
    return path


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens meanwhile, there is the old one or the new one, whole and on disk."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)  # a full disk is not to stay full because of it
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_network(path: Path, model: MorphModel) -> None:
    """Write the weights and the state of every slot to `network.pt`, as tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "slots": model.topology(), "weights": model.state_dict()}, buffer)
    write_file(path / NETWORK, buffer.getvalue())


def load_run(path: str | Path, *, task: Task | None = None, registry: BlueprintRegistry | None = None) -> nn.Module:
    """The trained network of a run directory, on the CPU and in eval mode.

    `task` and `registry` are needed where the run used ones of your own. Raises `FileNotFoundError` where there
    is no network, `ValueError` where it is of another format or does not fit the run's config.
    """
    path = Path(path)
    config = load_config(path)
    _require_file(path, NETWORK)
    saved: Mapping[str, Any] = torch.load(path / NETWORK, map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path / NETWORK}: expected format {FORMAT}, got {saved.get('format')!r}")
    with plain_defaults():
        host = (task or get_task(config.task, config.task_config())).build_host(config.host)
    slots = [values["slot"] for values in saved["slots"]]
    model = MorphModel(host, slots, growth=config.growth, registry=registry)
    model.rebuild(saved["slots"])
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise ValueError(f"{path / NETWORK} does not fit the network that {CONFIG} describes: {error}") from error
    return model.eval()


def load_config(path: Path) -> RunConfig:
    """The config of a run directory; `FileNotFoundError` if it is none."""
    _require_file(path, CONFIG)
    return from_dict(RunConfig, json.loads((path / CONFIG).read_text(encoding="utf-8")))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a run directory; a last line cut short by a kill is left out."""
    events = []
    lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path / METRICS}, line {number} is not JSON: {error}") from error
    return events


def cut_back(path: Path, epoch: int) -> None:
    """Cut a run's metrics back to the end of an epoch, 0 for nothing at all: a resumed run reports the rest itself."""
    events = read_metrics(path) if epoch else []
    kept = list(takewhile(lambda event: event["epoch"] <= epoch and event["event"] != "run_finished", events))
    with (path / METRICS).open("a+b") as file:
        file.seek(0)
        file.truncate(sum(map(len, islice(file, len(kept)))))


def _require_file(path: Path, name: str) -> None:
    if not (path / name).is_file():
        raise FileNotFoundError(f"{path} has no {name}: is it the directory of a run that was trained?")
