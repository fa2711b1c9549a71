"""Runs that were stopped, for the tests of checkpoints."""

import shutil
from pathlib import Path

from esper_train.run.checkpoint import saved


def stopped_after(epoch: int, whole: Path, directory: Path) -> Path:
    """The run as a kill during the next epoch leaves it: its metrics go on, its checkpoints do
    not."""
    shutil.copytree(whole, directory)
    for path in saved(directory / "checkpoints")[epoch:]:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink()
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }
