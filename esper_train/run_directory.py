"""The directory of a run: what it was asked, where it ran, what it reported, and the network it trained."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper_kernels
from esper_train.config import RunConfig, from_dict
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.lifecycle import SlotState
from esper_train.morph.model import MorphModel
from esper_train.tasks import Task, get_task

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
NETWORK, REPORT = "network.pt", "report.html"
BASELINE = "baseline"
"""Directory of the same host trained without slots."""
FORMAT = 1
"""Version of the layout of `network.pt`."""


def create(path: Path, config: RunConfig) -> Path:
    """Make a new run directory and write what the run was asked and where it runs.

    Raises `FileExistsError` if there is something at `path` already: no run overwrites another.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
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
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def save_network(path: Path, model: MorphModel) -> None:
    """Write the weights and the state of every slot to `network.pt`, as tensors and plain values only."""
    slots = [slot.state.to_plain() for slot in model.slots]
    torch.save({"format": FORMAT, "slots": slots, "weights": model.state_dict()}, path / NETWORK)


def load_run(path: str | Path, *, task: Task | None = None, registry: BlueprintRegistry | None = None) -> nn.Module:
    """The trained network of a run directory, on the CPU and in eval mode.

    `task` and `registry` are needed where the run used ones of your own. Raises `FileNotFoundError` where there
    is no network, `ValueError` where it is of another format or does not fit the run's config.
    """
    path = Path(path)
    for name in (CONFIG, NETWORK):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: is it the directory of a run that was trained?")
    config = load_config(path)
    saved: Mapping[str, Any] = torch.load(path / NETWORK, map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path / NETWORK}: expected format {FORMAT}, got {saved.get('format')!r}")
    host = (task or get_task(config.task, config)).build_host(config.host)
    states = [SlotState.from_plain(values) for values in saved["slots"]]
    slots, growth = [state.slot for state in states], config.growth
    model = MorphModel(host, slots, growth=growth, max_epochs=config.max_epochs, registry=registry)
    for state in states:
        blueprint = model.registry.require(host.topology, state.blueprint) if state.blueprint else None
        model.slot(state.slot).restore(state, blueprint)
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise ValueError(f"{path / NETWORK} does not fit the network that {CONFIG} describes: {error}") from error
    return model.eval()


def load_config(path: Path) -> RunConfig:
    """The config of a run directory."""
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
