"""Checkpoints: all that a run changes, in one file from which a fresh process goes on bit for bit.

`episode` takes them, `cli` restores them. `epoch-N.pt` holds tensors and plain values only, with its SHA-256 in a
file beside it; both appear whole and the digest first, so a kill at any moment leaves the checkpoints before.
"""

import copy
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper_train.build import Episode, attach_optimizer
from esper_train.config import CheckpointConfig, RunConfig, from_dict
from esper_train.control.policy import Policy
from esper_train.run_directory import write_file
from esper_train.state import Stateful
from esper_train.telemetry.hub import TelemetryHub

FORMAT = 1
"""Version of the layout of a checkpoint."""
FREE = ("max_epochs", "device", "data", "train", "telemetry", "checkpoint")
"""Config keys that may change where a run is resumed."""
PLAIN = frozenset({bool, int, float, str, type(None)})


def parts(episode: Episode, policy: Policy, hub: TelemetryHub) -> dict[str, Stateful]:
    """Everything that a run changes, in the order in which it is restored. A new object with state joins here."""
    return {
        "growth": _Growth(episode),
        "model": episode.model,
        "optimizers": episode.optimizers,
        "tracker": episode.tracker,
        "policy": policy,
        "telemetry": hub,
        "progress": episode.progress,
        "random": episode.random,
    }


class _Growth:
    """Which seeds are seated and which optimizers train them: rebuilt before weights and momentum are loaded."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def state_dict(self) -> dict[str, Any]:
        return {"slots": self._episode.model.topology(), "groups": list(self._episode.optimizers.parameters())}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._episode.model.rebuild(state_dict["slots"])
        for group in state_dict["groups"]:  # in their order, which is that of the gradient statistics
            if group not in self._episode.optimizers:
                attach_optimizer(self._episode, group)


class Checkpoints:
    """Keeps a copy of the state at the end of each epoch, and writes it when it is time or when the run ends.

    So a run that is stopped within an epoch is resumed from the end of the one before.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = directory
        self._config = config
        self._unwritten: tuple[int, dict[str, Any]] | None = None

    def take(self, episode: Episode, policy: Policy, hub: TelemetryHub, mode: str) -> None:
        """At the end of an epoch. `OSError` as `write`, `TypeError` for a state that is not tensors and plain values."""
        epoch = episode.progress.epoch
        state = {name: _copied(part.state_dict()) for name, part in parts(episode, policy, hub).items()}
        record = {"format": FORMAT, "config": asdict(episode.config), **_identity(episode, mode), "parts": state}
        self._unwritten = epoch, record
        if epoch % self._config.every == 0 or epoch == episode.config.max_epochs:
            self.write()

    def write(self) -> None:
        """Write what is not on disk yet, if anything; `OSError` where the disk does not take it."""
        if self._unwritten is None:
            return
        epoch, record = self._unwritten
        buffer = io.BytesIO()
        torch.save(record, buffer)
        self._directory.mkdir(parents=True, exist_ok=True)
        save(self._directory / f"epoch-{epoch}.pt", buffer.getvalue())
        self._unwritten = None
        for old in saved(self._directory)[: -self._config.keep]:
            old.unlink()
            _digest_file(old).unlink(missing_ok=True)


def saved(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(directory.glob("epoch-*.pt"), key=lambda path: int(path.stem.removeprefix("epoch-")))


def save(path: Path, data: bytes) -> None:
    """Write a checkpoint, after the digest by which it will be trusted."""
    write_file(_digest_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    write_file(path, data)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, running no code from it; `ValueError` if it is damaged, of another format, or none."""
    try:
        data, digest = path.read_bytes(), _digest_file(path).read_bytes()
        if digest[:64] != hashlib.sha256(data).hexdigest().encode():
            raise ValueError("its SHA-256 is not the one beside it, so it was damaged")
        return _read(data)
    except (FileNotFoundError, ValueError) as error:
        older = [other.name for other in saved(path.parent) if other != path]
        way_out = f"remove it to go on from {older[-1]}" if older else "there is no other, so start the run anew"
        raise ValueError(f"{path} cannot be used: {error}; {way_out}") from error


def restore(state: Mapping[str, Any], episode: Episode, policy: Policy, hub: TelemetryHub, mode: str) -> None:
    """Bring what was just built to where a checkpoint was taken.

    Raises `ValueError` for another mode, other data, a changed config key outside `FREE`, fewer epochs than are
    done, or a network that does not fit; what was built is of no use then.
    """
    was, now = from_dict(RunConfig, state["config"]), episode.config
    same = {f.name: (getattr(was, f.name), getattr(now, f.name)) for f in fields(RunConfig) if f.name not in FREE}
    for name, (then, asked) in (same | {k: (state[k], v) for k, v in _identity(episode, mode).items()}).items():
        if then != asked:
            free = ", ".join(FREE)
            raise ValueError(
                f"{name} was {then} and is {asked}: start a new run; one that is resumed may change {free}"
            )
    try:
        for name, part in parts(episode, policy, hub).items():
            part.load_state_dict(state["parts"][name])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the checkpoint does not fit the run that was built: {error}") from error
    if (done := episode.progress.epoch) > now.max_epochs:
        raise ValueError(f"{done} epochs are done, so max_epochs must be at least that, got {now.max_epochs}")


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _identity(episode: Episode, mode: str) -> dict[str, str]:
    return {"mode": mode, "data": json.dumps(dict(episode.data_record), sort_keys=True)}


def _copied(value: Any) -> Any:
    """A copy on the CPU, which further training leaves alone."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the attributes that a module's state has
        copied.update((key, _copied(item)) for key, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(value if set(map(type, value)) <= PLAIN else map(_copied, value))
    if type(value) not in PLAIN:
        raise TypeError(f"a checkpoint holds tensors and plain values only, got {value!r} in a part's state")
    return value


def _read(data: bytes) -> dict[str, Any]:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError("it is not a file of torch.save")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on what is not its own
        raise ValueError("it is damaged, or holds more than tensors and plain values") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {found!r}")
    return state
