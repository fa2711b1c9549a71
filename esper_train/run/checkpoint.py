"""Checkpoints: everything that a run changes, in one file, so that a new process continues bit for
bit.

`run` takes them, `job` restores them. `epoch-N.pt` holds only tensors and plain values, with its
SHA-256 in a file beside it. Both appear complete, the digest first, so that a kill at any moment
leaves the earlier checkpoints.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from esper_train.base.settings import differing
from esper_train.base.state import Stateful, copied
from esper_train.run.config import CheckpointConfig
from esper_train.run.directory import (
    METRICS,
    digest_file,
    read_checked,
    remove_unfinished,
    sync_metrics,
    write_digest,
    write_file,
)
from esper_train.run.episode import Episode

FORMAT = 2
"""Version of the layout of a checkpoint."""
ADDED = ("sources", "cost")
"""Parts that older checkpoints do not have, because they had no state then."""
FREE = (
    "max_epochs",
    "device",
    "data",
    "workers",
    "train",
    "telemetry",
    "checkpoint",
    "distributed",
)
"""Config keys that may change when a run is resumed."""


def parts(episode: Episode) -> dict[str, Stateful]:
    """Everything that a run changes, in the order in which it is restored. A new object with state
    joins here."""
    return {
        "episode": episode,  # seats the seeds
        "model": episode.model,
        "optimizers": episode.optimizers,
        "step": episode.step,
        "tracker": episode.tracker,
        "governor": episode.governor,
        "policy": episode.policy,
        "telemetry": episode.hub,
        "random": episode.random,
        "sources": episode.sources,
        "streams": episode.model.streams,
        "trial": episode.trial,
        "kept": episode.kept,
        "cost": episode.cost,
    }


def whole_states(episode: Episode) -> Iterator[tuple[str, Any]]:
    """Each part's name and state, as those of one process. With `fsdp2` every rank has to go
    through them, because what is divided is gathered."""
    for name, part in parts(episode).items():
        yield name, episode.whole(part.state_dict())


class Taker(Protocol):
    """The receiver of the states that `run_episode` saves."""

    def take(self, episode: Episode) -> None:
        """Called at the end of each epoch."""

    def write(self) -> None:
        """Called at the end of the run."""


class Beside:
    """Takes part in the gathering of states that rank 0 writes."""

    def take(self, episode: Episode) -> None:
        for _ in whole_states(episode):
            pass

    def write(self) -> None:
        pass


class Checkpoints:
    """Keeps a copy of the state at the end of each epoch, and writes it when it is time or when the
    run ends.

    So a run that is stopped within an epoch is resumed from the end of the one before.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = directory
        self._config = config
        self._unwritten: tuple[int, dict[str, Any]] | None = None

    def take(self, episode: Episode) -> None:
        """Keep the state at the end of an epoch. Raises `OSError` as `write` does, and `TypeError`
        for a state that is more than tensors and plain values."""
        state = {name: copied(each, "cpu") for name, each in whole_states(episode)}
        record = {
            "format": FORMAT,
            "run": _identity(episode),
            "parts": state,
            "metrics": self._metrics_size(),
        }
        self._unwritten = episode.epoch, record
        if episode.epoch % self._config.every == 0 or episode.epoch == episode.config.max_epochs:
            self.write()

    def write(self) -> None:
        """Write what is not on disk yet, if anything; `OSError` where that fails."""
        if self._unwritten is None:
            return
        epoch, record = self._unwritten
        if record["metrics"]:
            # a checkpoint must not outlive the metrics that lead to it
            sync_metrics(self._directory.parent)
        buffer = io.BytesIO()
        torch.save(record, buffer)
        self._directory.mkdir(parents=True, exist_ok=True)
        save(self._directory / f"epoch-{epoch}.pt", buffer.getvalue())
        self._unwritten = None
        drop_old(self._directory, self._config.keep)

    def _metrics_size(self) -> int:
        """Bytes that the run has reported so far."""
        metrics = self._directory.parent / METRICS
        return metrics.stat().st_size if metrics.exists() else 0


def saved(directory: Path, kind: str = "epoch") -> list[Path]:
    """The checkpoints in a directory, `KIND-N.pt`, oldest first."""
    return sorted(
        directory.glob(f"{kind}-[0-9]*.pt"), key=lambda path: int(path.stem.rpartition("-")[2])
    )


def drop_old(directory: Path, keep: int, kind: str = "epoch") -> None:
    """Remove all checkpoints but the newest, and what a kill left unfinished."""
    for old in saved(directory, kind)[:-keep]:
        old.unlink()
        digest_file(old).unlink(missing_ok=True)
    remove_unfinished(directory)


def save(path: Path, data: bytes) -> None:
    """Write a checkpoint, after the digest by which it will be trusted."""
    write_digest(path, data)
    write_file(path, data)


def load(path: Path, metrics: Path | None = None) -> dict[str, Any]:
    """Read a checkpoint, running no code from it.

    Raises `ValueError` if it is damaged, of another format, none, or if `metrics`, the file with
    what its run reported, is shorter than it was then.
    """
    try:
        data = read_checked(path, need_digest=True)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        if found != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found!r}")
        if metrics is not None:
            _require_metrics(metrics, state.get("metrics", 0))
    except Exception as error:  # the unpickler fails in many ways on foreign files
        why = (
            error
            if isinstance(error, (ValueError, OSError))
            else "it is more than tensors and plain values"
        )
        older = [
            other.name
            for other in saved(path.parent, path.stem.rpartition("-")[0])
            if other != path
        ]
        way_out = (
            f"remove it to go on from {older[-1]}"
            if older
            else "there is no other, so start the run anew"
        )
        raise ValueError(f"{path} cannot be used: {why}; {way_out}") from error
    return state


def restore(state: Mapping[str, Any], episode: Episode) -> None:
    """Bring an episode that was just built to the state of a checkpoint.

    Raises `ValueError` for another mode, other data, a changed config key outside `FREE`, fewer
    epochs than are done, or a network that does not fit; the episode must
    not be used then.
    """
    _require_same_run(state["run"], _identity(episode))
    for name, part in parts(episode).items():
        if name in ADDED and name not in state["parts"]:
            continue
        try:
            part.load_state_dict(state["parts"][name])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the checkpoint does not fit the run that was built: {name}: {error}"
            ) from error
    if episode.ranks is not None and not episode.ranks.first:  # the checkpoint is rank 0's
        episode.random.restart(episode.ranks.seed(episode.config.seed + 1 + episode.epoch))
    episode.trial.check(episode.model)
    left = episode.config.max_epochs - episode.epoch
    if left < 0:
        raise ValueError(
            f"{episode.epoch} epochs are done, more than max_epochs, {episode.config.max_epochs}"
        )
    schedule = episode.config.optim.schedule
    changes = left * (episode.steps if schedule.each == "step" else 1)
    episode.optimizers.fit_schedules(schedule, changes)


def _require_same_run(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings; the message names those that differ."""
    # a key that is missing in the checkpoint is a setting that did not exist then
    fixed = [key for key in now if key in was and key not in FREE]
    runs = [{key: run[key] for key in fixed} for run in (was, now)]
    for run in runs:
        run["data_record"] = json.loads(run["data_record"])
    changed = [f"{path} was {old} and is {new}" for path, (old, new) in differing(runs).items()]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}; a resumed run may change {', '.join(FREE)}, others need a new "
            "run"
        )


def _require_metrics(path: Path, size: int) -> None:
    """Refuse metrics that end before the checkpoint. Older checkpoints did not record the size."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise ValueError(
            f"{path.name} has {there} bytes and had {size} then, so its last lines are lost"
        )


def _identity(episode: Episode) -> dict[str, Any]:
    """The values that identify a run: its config, and those that the task and the data report."""
    data = json.dumps(dict(episode.data_record), sort_keys=True)
    return {"mode": episode.mode, "data_record": data, **asdict(episode.config)}
