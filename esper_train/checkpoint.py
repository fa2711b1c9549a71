"""Checkpoints: all that a run changes, in one file that a fresh process can go on from, bit for bit.

`episode` takes them, `cli` restores them. A file `epoch-N.pt` holds tensors and plain values only, and its SHA-256
lies beside it; it appears at once and whole, after its digest, so a kill at any moment leaves the ones before.
"""

import copy
import hashlib
import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
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
FREE = ("max_epochs", "device", "data", "train.kernel.", "train.compile.", "telemetry.", "checkpoint.")
"""Config keys, or beginnings of them, that a resumed run may change."""
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
    """Which seeds are seated and which optimizers train them: rebuilt before weights and momentum can be loaded."""

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
    """The checkpoints of a run while it is made: writes one every few epochs and, on leaving, of the last epoch.

    A run that is stopped within an epoch is resumed from the end of the one before, of which a copy is therefore
    kept in memory until there is a later one.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = directory
        self._config = config
        self._unwritten: tuple[int, dict[str, Any]] | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def take(self, episode: Episode, policy: Policy, hub: TelemetryHub, mode: str) -> None:
        """Keep the state at the end of an epoch, and write it when it is time.

        `OSError` if the disk does not take it, `TypeError` if a part's state is more than tensors and plain values.
        """
        epoch = episode.progress.epoch
        state = {
            "format": FORMAT,
            "mode": mode,
            "config": asdict(episode.config),
            "data": _identity(episode),
            "parts": {name: _copied(part.state_dict(), name) for name, part in parts(episode, policy, hub).items()},
        }
        self._unwritten = epoch, state
        if epoch % self._config.every == 0 or epoch == episode.config.max_epochs:
            self._write()

    def _write(self) -> None:
        if self._unwritten is not None:
            epoch, state = self._unwritten
            self._directory.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            save(self._directory / f"epoch-{epoch}.pt", buffer.getvalue())
            self._unwritten = None
            for old in saved(self._directory)[: -self._config.keep]:
                old.unlink()
                _digest_file(old).unlink(missing_ok=True)


def saved(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(directory.glob("epoch-*.pt"), key=lambda path: int(path.stem.removeprefix("epoch-")))


def save(path: Path, data: bytes) -> None:
    """Write a checkpoint, its digest first: where there is a file, there is a digest to trust it by."""
    write_file(_digest_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    write_file(path, data)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, running no code from it; `ValueError` if it is damaged, of another format, or none."""
    try:
        data, digest = path.read_bytes(), _digest_file(path).read_text(encoding="ascii").split()[0]
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"its SHA-256 is not the one in {_digest_file(path).name}, so it was damaged")
        return _read(data)
    except (FileNotFoundError, ValueError, IndexError) as error:
        older = [other.name for other in saved(path.parent) if other != path]
        way_out = f"to go on from {older[-1]}, remove it" if older else "there is no other: start the run anew"
        raise ValueError(f"{path} cannot be used: {error}; {way_out}") from error


def _copied(value: Any, part: str) -> Any:
    """A copy on the CPU that further training leaves alone; `TypeError` for what could not be read back."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        copied = copy.copy(value)  # with the attributes that a module's state has
        copied.update((key, _copied(item, part)) for key, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(value if set(map(type, value)) <= PLAIN else [_copied(item, part) for item in value])
    if type(value) not in PLAIN:
        raise TypeError(
            f"the state of {part!r} has a {type(value).__name__}; a checkpoint holds tensors, dicts, lists, tuples, "
            "numbers, strings and None, because reading anything else could run code"
        )
    return value


def _read(data: bytes) -> dict[str, Any]:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError("it is not a file of torch.save")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on what is not its own
        raise ValueError("it is damaged, or holds more than tensors and plain values") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"expected format {FORMAT}, got {got!r}")
    return state


def restore(state: Mapping[str, Any], episode: Episode, policy: Policy, hub: TelemetryHub, mode: str) -> None:
    """Bring what was just built to where a checkpoint was taken.

    Raises `ValueError` if the run was of another mode, its data or a config key outside `FREE` differ, it has
    more epochs behind it than are asked for, or its network does not fit; what was built is of no use then.
    """
    before, now = (_flat(asdict(c)) for c in (from_dict(RunConfig, state["config"]), episode.config))
    changes = {"mode": (state["mode"], mode), "data": (state["data"], _identity(episode))}
    changes |= {key: (before[key], now[key]) for key in now if not key.startswith(FREE)}
    for key, (then, asked) in changes.items():
        if then != asked:
            free = ", ".join(key.rstrip(".") for key in FREE)
            raise ValueError(
                f"a run cannot be resumed with another {key}: it was {then!r} and is {asked!r}; "
                f"only {free} may change. Start a new run instead"
            )
    targets = parts(episode, policy, hub)
    try:
        for name, part in targets.items():
            part.load_state_dict(state["parts"][name])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the checkpoint does not fit the run that was built: {error}") from error
    if episode.progress.epoch > episode.config.max_epochs:
        raise ValueError(
            f"the run has {episode.progress.epoch} epochs behind it, max_epochs is {episode.config.max_epochs}"
        )


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _identity(episode: Episode) -> str:
    """What identifies the data."""
    return json.dumps(dict(episode.data_record), sort_keys=True)


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {where + key: value}
    return flat
