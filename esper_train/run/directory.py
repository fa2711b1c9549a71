"""The directory of a run: its config, where it ran, what it reported, and the trained network."""

import fcntl
import hashlib
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

import esper_kernels
from esper_train.base.device import plain_defaults
from esper_train.base.settings import from_dict
from esper_train.config import RunConfig
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.tasks import Task, is_place, new_host, registry_of, task_of_run

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
NETWORK = "network.pt"
POLICY = "policy.pt"
"""A learned policy: the one that a run grew under, or the one that PPO trained."""
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
"""Exists while a process writes to the directory and holds the lock; unlocked if it was killed."""
UNFINISHED = ".new"
"""Suffix of a file that is not complete yet."""
BASELINE = "baseline"
"""Directory of the same host trained without slots."""
FORMAT = 2
"""Version of the layout of `network.pt`."""


@contextmanager
def claimed(path: Path, *, resume: bool = False, numbered: bool = False) -> Iterator[Path]:
    """Make a run directory, unless it is there, and keep every other process from writing to it
    meanwhile.

    Yields its path: with `numbered`, that of a new directory, with a number at its end where the
    name was taken. If this process dies, the system releases the lock. What was made and
    stayed empty is removed again.

    Raises:
        FileExistsError: there is something at `path` already, and no `resume`: no run overwrites
        another.
        BlockingIOError: another process writes to it.
    """
    made = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if numbered:
        path = _new(path)
    elif path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another --out, or remove it")
    if numbered or not path.exists():
        path.mkdir(exist_ok=True)
        made.insert(0, path)
    lock = _lock(path / LOCK)
    try:
        if not resume and any(entry.name != LOCK for entry in path.iterdir()):
            raise FileExistsError(
                f"{path} exists and is not empty; choose another --out, or remove it"
            )
        remove_unfinished(path)
        yield path
    finally:
        # before the lock is released, so that the next process makes a new directory
        (path / LOCK).unlink(missing_ok=True)
        lock.close()
        with suppress(OSError):  # it is not empty
            for each in made:
                each.rmdir()


def _new(path: Path) -> Path:
    """Make a directory and return it: `path`, or one with a number added where that exists
    already."""
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError("counting has no end")


def _lock(path: Path) -> BinaryIO:
    """The lock file, locked, with our process number in it. Made again where its last owner has
    just removed it."""
    while True:
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        os.register_at_fork(after_in_child=lock.close)  # worker processes must not inherit the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = lock.read().decode() or "unknown"
            lock.close()
            advice = "wait for it, stop it, or choose another directory"
            raise BlockingIOError(
                f"{path.parent} is in use by process {owner}; {advice}"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            return lock
        lock.close()


def create(path: Path, config: RunConfig) -> Path:
    """Write a run's config and its environment into its directory."""
    path.mkdir(parents=True, exist_ok=True)
    environment = {
        "esper": esper_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": config.device,
        "command": shlex.join(sys.argv),
    }
    write_with_digest(path / CONFIG, (json.dumps(asdict(config), indent=2) + "\n").encode())
    write_file(path / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())
    return path


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: whatever happens, the old or the new one is complete and on disk."""
    new = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)  # the unfinished file must not fill the disk
        raise
    _sync(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what a kill during `write_file` left in a directory."""
    for left in path.glob(f".*{UNFINISHED}"):
        left.unlink()


def sync_metrics(path: Path) -> None:
    """Make sure that a run's metrics are on disk."""
    for each in (path / METRICS, path):
        _sync(each)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_with_digest(path: Path, data: bytes) -> None:
    """Write a file that may be there already, and its SHA-256 beside it.

    A kill in between leaves a file without a digest, never one with that of another.
    """
    digest_file(path).unlink(missing_ok=True)
    write_file(path, data)
    write_digest(path, data)


def write_digest(path: Path, data: bytes) -> None:
    """Write the SHA-256 of a file's contents beside it, as `sha256sum --check` reads it."""
    write_file(digest_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())


def read_checked(path: Path, *, need_digest: bool = False) -> bytes:
    """The contents of a file; `ValueError` if they are not those of the digest beside it.

    Without a digest, which older versions did not write, they are returned unless `need_digest`:
    then that is an `OSError`.
    """
    data = path.read_bytes()
    beside = digest_file(path)
    if not need_digest and not beside.exists():
        return data
    if beside.read_bytes()[:64] != hashlib.sha256(data).hexdigest().encode():
        raise ValueError(
            f"the SHA-256 of {path.name} is not the one beside it, so it was damaged or changed"
        )
    return data


def digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def save_network(path: Path, model: MorphModel, weights: Mapping[str, Any]) -> None:
    """Write the weights and the state of every slot to `network.pt`, as tensors and plain values
    only."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "slots": model.topology(), "weights": weights}, buffer)
    write_with_digest(path / NETWORK, buffer.getvalue())


def load_run(
    path: str | Path, *, task: Task | None = None, registry: BlueprintRegistry | None = None
) -> nn.Module:
    """The trained network of the run directory `path`, on the CPU and in eval mode.

    `task` and `registry` are needed where the run used ones of your own; nothing here imports the
    module of a task. Raises `FileNotFoundError` where there is no network, `ValueError` where it
    was damaged, is of another format or does not fit the run's config, and for a task of another
    name.
    """
    path = Path(path)
    config = load_config(path)
    own = task_of_run(config.task, config.task_config(), task)
    _require_file(path, NETWORK)
    data = _read_whole(path / NETWORK)
    saved: Mapping[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path / NETWORK}: expected format {FORMAT}, got {saved.get('format')!r}")
    with plain_defaults():
        host = new_host(own, config.host)
    slots = [values["slot"] for values in saved["slots"]]
    model = MorphModel(host, slots, growth=config.growth, registry=registry_of(own, registry))
    model.rebuild(saved["slots"])
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise ValueError(
            f"{path / NETWORK} does not fit the network that {CONFIG} describes: {error}"
        ) from error
    return model.eval()


def load_config(path: Path) -> RunConfig:
    """The config of a run directory. Raises as `read_config` does, and `ValueError` for settings
    that this version does not have."""
    values = read_config(path)
    try:
        config = from_dict(RunConfig, values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path / CONFIG} does not fit this version: {error}; {ENVIRONMENT} beside it says "
            "which version wrote it, or start a new run (`report` reads the old one)"
        ) from error
    if is_place(config.task):  # a run directory cannot cause an import
        raise ValueError(
            f"{path / CONFIG} names the task {config.task!r}, which is no name of a task; bring it "
            "back, or start a new run"
        )
    return config


def read_config(path: Path) -> dict[str, Any]:
    """The config of a run directory as plain values.

    Raises `FileNotFoundError` if it is no run directory, `ValueError` if the config was damaged or
    changed.
    """
    _require_file(path, CONFIG)
    try:
        values = json.loads(_read_whole(path / CONFIG))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path / CONFIG} is not JSON: {error}; bring it back, or start a new run"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path / CONFIG} holds no settings; bring it back, or start a new run")
    return values


def _read_whole(path: Path) -> bytes:
    try:
        return read_checked(path)
    except ValueError as error:
        advice = f"bring it back; if the change was meant, remove {digest_file(path).name}"
        raise ValueError(f"{path} cannot be used: {error}; {advice}") from error


def runs_in(path: Path) -> list[Path]:
    """The run directories that a path names: itself, or those in it, including single episodes.

    Baselines belong to their runs and are left out. Raises `ValueError` if there is no run.
    """
    if (path / METRICS).is_file():
        return [path]
    found = [file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/{METRICS}")]
    runs = sorted(run for run in found if not (run.parent / METRICS).is_file())
    if not runs:
        raise ValueError(f"no run in {path}: neither it nor a folder in it has a {METRICS}")
    return runs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events in a run directory, without a last line that a kill cut short."""
    events = []
    lines = (path / METRICS).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path / METRICS}, line {number} is not JSON: {error}") from error
        if not isinstance(event, dict) or not {"event", "epoch"} <= event.keys():
            raise ValueError(f"{path / METRICS}, line {number} is no event of a run: {line[:60]!r}")
        events.append(event)
    return events


def cut_back(path: Path, epoch: int) -> None:
    """Cut a run's metrics back to the end of an epoch, 0 for nothing at all: a resumed run reports
    the rest itself. `ValueError` where an epoch is there twice, or before an earlier one."""
    events = read_metrics(path) if epoch else []
    kept = list(
        takewhile(
            lambda event: event["epoch"] <= epoch and event["event"] != "run_finished", events
        )
    )
    epochs = [event["epoch"] for event in kept if event["event"] == "epoch"]
    for before, after in pairwise(epochs):
        if after <= before:
            raise ValueError(
                f"{path / METRICS} has epoch {after} after epoch {before}, so it was changed; "
                "bring back what the run wrote, or start the run anew"
            )
    with (path / METRICS).open("a+b") as file:
        file.seek(0)
        file.truncate(sum(map(len, islice(file, len(kept)))))


def _require_file(path: Path, name: str) -> None:
    if not (path / name).is_file():
        raise FileNotFoundError(
            f"{path} has no {name}: is it the directory of a run that was trained?"
        )
