"""A full, read-only or failing disk leaves the files that were there before, and a clear error."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper_train.run import checkpoint
from esper_train.run.checkpoint import load, save, saved
from esper_train.run.directory import read_metrics, write_file
from tests.helpers.growing_run import reported, resume, start
from tests.helpers.stopped import contents

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_metrics_are_on_disk_before_a_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which files are synced: the metrics' own file before each checkpoint's digest
    and data."""
    synced: list[str] = []
    inner = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.strip("."))
        inner(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert start(tmp_path / "run", "--max-epochs", "2", "--checkpoint.every", "1") == 0
    for epoch in (1, 2):
        place = synced.index(f"epoch-{epoch}.pt.sha256.new")
        assert synced[place - 2 : place] == ["metrics.jsonl", "run"]
        assert synced.index(f"epoch-{epoch}.pt.new") > place


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system itself cuts writes at this size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up the rights of root, to whom no directory is read-only."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"root cannot become another user here: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_full_disk_leaves_the_checkpoints_before(whole: Path, tmp_path: Path) -> None:
    data = (whole / "checkpoints" / "epoch-7.pt").read_bytes()
    save(tmp_path / "epoch-6.pt", data)
    before = contents(tmp_path)
    for size in (0, 10, 5000):
        with no_file_above(size), pytest.raises(OSError, match="too large"):
            save(tmp_path / "epoch-7.pt", data)
        assert [path.name for path in saved(tmp_path)] == ["epoch-6.pt"]
        assert all(contents(tmp_path)[name] == value for name, value in before.items())
        assert not list(tmp_path.glob(".*"))  # nothing half-written takes up room
    save(tmp_path / "epoch-7.pt", data)
    assert load(tmp_path / "epoch-7.pt")["parts"]["episode"]["epoch"] == 7


def test_a_run_whose_disk_fills_up_ends_with_a_clear_error_and_can_be_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = checkpoint.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == "epoch-10.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        inner(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", full)
        assert start(tmp_path / "run", "--checkpoint.every", "5") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert read_metrics(tmp_path / "run")[-1]["status"] == "failed"
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-5.pt"]
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def test_a_read_only_directory_is_named(
    whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("read-only")
    save(directory / "epoch-6.pt", b"old")
    before = contents(directory)
    directory.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(PermissionError, match="epoch-7"):
            save(directory / "epoch-7.pt", b"new")
    finally:
        directory.chmod(0o755)
    assert contents(directory) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    write_file(tmp_path / "file", b"old")
    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="broken"):
        write_file(tmp_path / "file", b"new")
    assert contents(tmp_path) == {"file": b"old"}
