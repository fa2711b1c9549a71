"""Checkpoints: what they hold, that a resumed run cannot be told from one that never stopped, what
is refused."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from esper_train import Idle, RunConfig, TelemetryConfig, TelemetryHub, TrainStep, cli, load_run
from esper_train.base.state import RandomState, copied
from esper_train.base.stop import StopRequest
from esper_train.run import checkpoint
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Checkpoints, load, restore, save, saved
from esper_train.run.config import CheckpointConfig
from esper_train.run.directory import cut_back, read_metrics, write_file
from esper_train.run.report import write_report
from tests.helpers.growing_run import reported, resume, start
from tests.helpers.scripted import run_under

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a checkpoint of every epoch."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert start(directory, "--checkpoint.every", "1", "--checkpoint.keep", "99") == 0
    return directory


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report would take longer than the runs."""
    monkeypatch.setattr(cli, "write_report", lambda directory: directory)


def stopped_after(epoch: int, whole: Path, directory: Path) -> Path:
    """The run as a kill during the next epoch leaves it: its metrics go on, its checkpoints do
    not."""
    shutil.copytree(whole, directory)
    for path in saved(directory / "checkpoints")[epoch:]:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink()
    return directory


def slot_stages(directory: Path, epoch: int) -> set[str]:
    state = load(directory / "checkpoints" / f"epoch-{epoch}.pt")
    return {slot["stage"] for slot in state["parts"]["episode"]["slots"]}


# epoch: what the checkpoint finds in the slots
@pytest.mark.parametrize(
    ("epoch", "stages"),
    [
        (2, {"TRAINING"}),
        (6, {"BLENDING"}),
        (8, {"PROBATIONARY"}),
        (10, {"EMBARGOED"}),
        (20, {"FOSSILIZED"}),
    ],
)
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(
    epoch: int, stages: set[str], whole: Path, tmp_path: Path
) -> None:
    directory = stopped_after(epoch, whole, tmp_path / "run")
    assert stages <= slot_stages(directory, epoch)
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)
    first, second = (
        torch.load(d / "network.pt", weights_only=True)["weights"] for d in (whole, directory)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--optim.kind", "adamw"), ("--task", "synthetic-lm"), ("--task", "digits")]
)
def test_other_optimizers_and_tasks_resume_exactly(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    assert (
        start(
            tmp_path / "a" / "run", "--checkpoint.every", "1", "--checkpoint.keep", "99", *options
        )
        == 0
    )
    for epoch in (1, 7, 13):
        directory = stopped_after(epoch, tmp_path / "a" / "run", tmp_path / str(epoch))
        assert resume(directory) == 0
        assert reported(directory) == reported(tmp_path / "a" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["episode", "model", "optimizers", "tracker", "policy", "random", "streams", "trial", "kept"],
)
def test_every_part_has_its_share(
    part: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one part the run ends differently or is refused, so the comparison above would
    show the loss."""
    # the best network only matters once it is an earlier one
    directory = stopped_after(19 if part == "kept" else 9, whole, tmp_path / "run")
    inner = checkpoint.parts
    monkeypatch.setattr(
        checkpoint, "parts", lambda *a: {k: v for k, v in inner(*a).items() if k != part}
    )
    try:
        status = resume(directory)
    except AssertionError:  # a trial that nobody knows of cannot be undone
        assert part == "trial"
        return
    assert status == 2 or reported(directory) != reported(whole)


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
def test_schedules_and_the_loss_scale_go_on_where_they_were(kind: str, tmp_path: Path) -> None:
    """From a scale that overflows at first, with a seed that has a schedule of its own, and with
    other workers."""
    options = [
        "--optim.schedule.kind",
        kind,
        "--train.amp.dtype",
        "float16",
        "--train.amp.init-scale",
        "1e9",
    ]
    options += ["--train.accumulate", "2", "--checkpoint.every", "1", "--checkpoint.keep", "99"]
    assert start(tmp_path / "whole", *options) == 0
    directory = stopped_after(6, tmp_path / "whole", tmp_path / "run")
    assert resume(directory, "--workers", "1") == 0
    assert reported(directory) == reported(tmp_path / "whole")
    states = [
        load(d / "checkpoints" / "epoch-7.pt")["parts"] for d in (tmp_path / "whole", directory)
    ]
    assert 0 < states[0]["step"]["scale"] == states[1]["step"]["scale"] < 1e9
    for group in ("host", "early"):
        assert (
            states[0]["optimizers"][group]["schedule"] == states[1]["optimizers"][group]["schedule"]
        )


def test_a_checkpoint_holds_every_part_as_tensors_and_plain_values(whole: Path) -> None:
    state = torch.load(whole / "checkpoints" / "epoch-6.pt", weights_only=True)
    parts = {
        "episode",
        "model",
        "optimizers",
        "step",
        "tracker",
        "governor",
        "policy",
        "telemetry",
        "random",
    }
    parts |= {"streams", "trial", "kept"}
    assert set(state) == {"format", "run", "parts", "metrics"}
    assert set(state["parts"]) == parts
    assert {"python", "numpy", "torch", "order"} <= set(state["parts"]["random"])
    assert any(group.endswith(".gate") for group in state["parts"]["optimizers"])
    digest = (whole / "checkpoints" / "epoch-6.pt.sha256").read_text().split()
    data = (whole / "checkpoints" / "epoch-6.pt").read_bytes()
    # as `sha256sum --check` reads it
    assert digest == [hashlib.sha256(data).hexdigest(), "epoch-6.pt"]


def test_taking_checkpoints_changes_nothing(whole: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--checkpoint.every", "1000") == 0
    assert reported(tmp_path / "run") == reported(whole)
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-20.pt"]


def test_every_few_epochs_and_the_newest_are_kept(whole: Path, tmp_path: Path) -> None:
    """What a kill during an earlier save has left goes too."""
    options = ("--max-epochs", "8", "--checkpoint.every", "3", "--checkpoint.keep", "2")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "run" / "checkpoints" / ".epoch-5.pt.new").write_bytes(b"half")
    assert resume(tmp_path / "run", *options) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["epoch-6.pt", "epoch-6.pt.sha256", "epoch-8.pt", "epoch-8.pt.sha256"]


class AtBatch:
    """Does something in the n-th training batch, and counts those that were finished."""

    def __init__(
        self, number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.begun = self.finished = 0
        inner = TrainStep.__call__

        def wrapped(step: TrainStep, *arguments: Any) -> None:
            self.begun += 1
            if self.begun == number:
                action()
            inner(step, *arguments)
            self.finished += 1

        monkeypatch.setattr(TrainStep, "__call__", wrapped)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_the_batch_finish_and_loses_no_epoch(
    number: signal.Signals, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three batches of epoch 7, while a seed is blended in."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        batches = AtBatch(6 * 3 + 2, lambda: signal.raise_signal(number), patch)
        assert start(tmp_path / "run") == code
    assert batches.begun == batches.finished == 6 * 3 + 2
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-6.pt"]
    assert read_metrics(tmp_path / "run")[-1]["status"] == "interrupted"
    assert load_run(tmp_path / "run")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def test_the_same_signal_sent_twice_at_once_is_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` signals its child and the child's group."""

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    AtBatch(2, twice, monkeypatch)
    assert start(tmp_path / "run") == 143


def test_under_nohup_the_loss_of_the_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert stop.before("batch") == "batch"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        AtBatch(1, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert start(tmp_path / "run") == 143
    assert saved(tmp_path / "run" / "checkpoints") == []
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def test_episodes_and_baselines_are_resumed_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the baseline of the first of two episodes, 2 epochs of 2 batches each."""
    common = [
        "heuristic",
        "--task",
        "synthetic",
        "--max-epochs",
        "2",
        "--max-batches",
        "2",
        "--episodes",
        "2",
    ]
    assert cli.main([*common, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        AtBatch(4 + 3, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert cli.main([*common, "--out", str(tmp_path / "run")]) == 143
    assert not (tmp_path / "run" / "episode-2").exists()
    assert cli.main(["heuristic", "--resume", str(tmp_path / "run")]) == 0
    for part in ("episode-1", "episode-1/baseline", "episode-2", "episode-2/baseline"):
        assert reported(tmp_path / "run" / part) == reported(tmp_path / "whole" / part)


def test_a_crash_leaves_the_last_finished_epoch(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise OSError("the storage of the data went away")

    with monkeypatch.context() as patch:
        AtBatch(4 * 3 + 1, crash, patch)
        assert start(tmp_path / "run") == 2
    assert [path.name for path in saved(tmp_path / "run" / "checkpoints")] == ["epoch-4.pt"]
    assert resume(tmp_path / "run") == 0
    assert reported(tmp_path / "run") == reported(whole)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host.width", "5"), "host.width was None and is 5; a resumed run"),
        (("--slots", "early", "mid"), "slots was ('early', 'mid', 'late') and is ('early', 'mid')"),
        (("--task", "digits"), "task was synthetic and is digits"),
        (("--optim.host-lr", "0.5"), "optim.host_lr was 0.01 and is 0.5; a resumed run"),
        (("--seed", "7"), "seed was 1 and is 7"),
        (("--seed", "7", "--host.depth", "2"), "seed was 1 and is 7, host.depth was None and is 2"),
        (("--max-epochs", "4"), "20 epochs are done"),
        (("--out", "elsewhere"), "leave out --out"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(
    options: tuple[str, ...], message: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    assert resume(whole, *options) == 2
    assert message in capsys.readouterr().err
    assert contents(whole) == before


def test_another_mode_or_a_directory_without_a_run_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--resume", str(whole)]) == 2
    assert "mode was heuristic and is fit" in capsys.readouterr().err
    assert resume(tmp_path) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_other_data_is_refused() -> None:
    episode = build_episode(RunConfig(task="synthetic"), slots=())
    state = {"run": checkpoint._identity(episode)}
    episode.data_record = {"sha256": "of other data"}
    with pytest.raises(ValueError, match=r"data_record.sha256 was None and is of other data;"):
        restore(state, episode)


def test_a_setting_that_a_checkpoint_does_not_know_is_no_other_run() -> None:
    episode = build_episode(RunConfig(task="synthetic", evaluation_batch=64), slots=())
    run = checkpoint._identity(episode)
    parts = {name: part.state_dict() for name, part in checkpoint.parts(episode).items()}
    with pytest.raises(ValueError, match="evaluation_batch was 512 and is 64"):
        restore({"run": run | {"evaluation_batch": 512}, "parts": parts}, episode)
    del run["evaluation_batch"]
    restore({"run": run, "parts": parts}, episode)
    assert episode.epoch == 0


def test_more_epochs_go_on_from_the_end(whole: Path, tmp_path: Path) -> None:
    directory = stopped_after(20, whole, tmp_path / "run")
    assert resume(directory, "--max-epochs", "22") == 0
    lines = reported(directory)
    assert lines[: len(reported(whole)) - 1] == reported(whole)[:-1]
    epochs = [event["epoch"] for event in read_metrics(directory) if event["event"] == "epoch"]
    assert epochs == list(range(1, 23))
    assert json.loads((directory / "config.json").read_text())["max_epochs"] == 22
    assert "22 of 22 epochs" in write_report(directory).read_text()


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Ways in which a file can be broken, with a generator that always draws the same."""
    draw = random.Random(0)
    yield "empty", b""
    for place in sorted(draw.randrange(1, len(data)) for _ in range(5)):
        yield f"cut at {place}", data[:place]
    for place in sorted(draw.randrange(len(data)) for _ in range(20)):
        yield (
            f"bit in {place}",
            data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
        )
    yield "foreign text", b"epoch,loss\n1,2.3\n"
    buffer = io.BytesIO()
    torch.save({"state": torch.zeros(3)}, buffer)
    yield "foreign file of torch", buffer.getvalue()
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    yield "foreign list of torch", buffer.getvalue()


def test_damaged_and_foreign_checkpoints_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "epoch-7.pt"
    data = (whole / "checkpoints" / "epoch-7.pt").read_bytes()
    save(tmp_path / "epoch-6.pt", (whole / "checkpoints" / "epoch-6.pt").read_bytes())
    save(path, data)
    for name, damaged in damages(data):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError,
            match=r"epoch-7.pt cannot be used: .*damaged or changed; remove it to go on from "
            r"epoch-6",
        ):
            pytest.fail(f"{name} was read: {load(path)}")
    path.write_bytes(data)
    assert load(path)["parts"]["episode"]["epoch"] == 7


def test_what_is_not_a_checkpoint_is_refused_even_with_the_right_digest(
    whole: Path, tmp_path: Path
) -> None:
    """As if someone had made the digest to fit; bits flipped in tensors cannot be told then, so
    they are left out."""
    data = (whole / "checkpoints" / "epoch-7.pt").read_bytes()
    for name, damaged in damages(data):
        if not name.startswith("bit"):
            save(tmp_path / "epoch-1.pt", damaged)
            with pytest.raises(
                ValueError, match=r"epoch-1.pt cannot be used: .*start the run anew"
            ):
                pytest.fail(f"{name} was read: {load(tmp_path / 'epoch-1.pt')}")


@pytest.mark.parametrize("damage", ["cut to epoch 3", "cut within a line", "gone", "other file"])
def test_a_gap_between_metrics_and_checkpoint_is_refused(
    damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stopped_after(7, whole, tmp_path / "run")
    metrics = directory / "metrics.jsonl"
    size = load(directory / "checkpoints" / "epoch-7.pt")["metrics"]
    lines = metrics.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        metrics.unlink()
    else:
        kept = {
            "cut to epoch 3": b"".join(lines[:4]),
            "cut within a line": b"".join(lines)[: size - 1],
        }
        metrics.write_bytes(kept.get(damage, b'{"event": "run_started", "epoch": 0}\n'))
    before = contents(directory)
    assert resume(directory) == 2
    assert (
        f"and had {size} then, so its last lines are lost; remove it to go on"
        in capsys.readouterr().err
    )
    assert contents(directory) == before


def test_metrics_cut_to_an_older_checkpoint_are_gone_on_from(whole: Path, tmp_path: Path) -> None:
    """As the refusal says, once the newer checkpoints are removed."""
    directory = stopped_after(3, whole, tmp_path / "run")
    size = load(directory / "checkpoints" / "epoch-3.pt")["metrics"]
    os.truncate(directory / "metrics.jsonl", size)
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)


def test_metrics_are_on_disk_before_a_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is synced, in its order: the metrics' own file before each checkpoint's digest and
    data."""
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


@pytest.mark.parametrize("shape", ["zip", "legacy"])
def test_a_malicious_checkpoint_runs_no_code(shape: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "sprung",))

    buffer = io.BytesIO()
    state = {"format": 2, "run": {}, "parts": Trap()}
    torch.save(state, buffer, _use_new_zipfile_serialization=shape == "zip")
    save(tmp_path / "epoch-1.pt", buffer.getvalue())
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        load(tmp_path / "epoch-1.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_without_its_digest_or_of_another_version_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    data = (whole / "checkpoints" / "epoch-7.pt").read_bytes()
    (tmp_path / "epoch-7.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"epoch-7\.pt\.sha256"):
        load(tmp_path / "epoch-7.pt")
    buffer = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(data), weights_only=True), "format": 99}, buffer)
    save(tmp_path / "epoch-7.pt", buffer.getvalue())
    with pytest.raises(ValueError, match="expected format 2, got 99"):
        load(tmp_path / "epoch-7.pt")


def test_a_run_with_a_damaged_checkpoint_says_how_to_go_on_from_the_one_before(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stopped_after(7, whole, tmp_path / "run")
    newest = directory / "checkpoints" / "epoch-7.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    before = contents(directory)
    assert resume(directory) == 2
    assert f"{newest} cannot be used" in (said := capsys.readouterr().err)
    assert "remove it to go on from epoch-6.pt" in said
    assert contents(directory) == before
    newest.unlink()
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)


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
    """Without the rights of root, to whom no directory is read-only."""
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


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_taken(tmp_path: Path) -> None:
    class Learner(Idle):
        STATE = ("weight",)
        weight = numpy.float64(0.5)  # pickled as an object of numpy's

    episode = build_episode(RunConfig(task="synthetic", max_epochs=1, max_batches=1), slots=())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(TypeError, match=r"tensors and plain values only, got .*0\.5"):
        run_under(episode, Learner(), mode="fit", checkpoints=checkpoints)
    assert saved(tmp_path) == []


def test_a_network_that_does_not_fit_is_refused(whole: Path) -> None:
    config = RunConfig(task="synthetic", max_epochs=20)
    state = load(saved(whole / "checkpoints")[-1])
    for slots, message in (
        (("early",), "expected slots"),
        (("early", "mid", "late"), "does not fit"),
    ):
        episode = build_episode(config, slots=slots)
        same = {**state, "run": checkpoint._identity(episode)}
        same["parts"] = {**state["parts"], "model": {}}
        with pytest.raises(ValueError, match=message):
            restore(same, episode)


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def test_random_numbers_go_on_where_they_were_and_the_callers_are_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = [draws(), draws()]
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    callers = [draws()]
    order = torch.Generator().manual_seed(3)
    first = RandomState(5, CPU, order)
    with first.active():
        draws()
        torch.rand(2, generator=order)
        state = first.state_dict()
        then = [draws(), torch.rand(2, generator=order).tolist()]
    other_order = torch.Generator()
    second = RandomState(99, CPU, other_order)
    second.load_state_dict(state)
    with second.active():
        assert [draws(), torch.rand(2, generator=other_order).tolist()] == then
    callers.append(draws())
    assert callers == expected


def test_a_seed_fixes_all_random_numbers() -> None:
    drawn = []
    for seed in (5, 5, -6):
        with RandomState(seed, CPU).active():
            drawn.append(draws())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_the_hub_stays_escalated() -> None:
    hubs = [TelemetryHub((), TelemetryConfig(escalation_epochs=3)) for _ in range(2)]
    hubs[0].escalate()
    hubs[0].tick()
    hubs[1].load_state_dict(hubs[0].state_dict())
    assert hubs[1].state_dict() == {"_escalated_epochs": 2}


def test_a_copy_does_not_follow_the_training() -> None:
    weight = torch.zeros(3)
    state = {"a": weight, "b": [1, {"c": weight}], "d": (1, "x", None)}
    taken = copied(state)
    weight += 1
    state["b"].append(2)  # type: ignore[union-attr]
    assert taken["a"].tolist() == [0, 0, 0]
    assert taken["b"][1]["c"].tolist() == [0, 0, 0]
    assert len(taken["b"]) == 2


def test_cut_back_keeps_what_was_reported_up_to_an_epoch(tmp_path: Path) -> None:
    events = [
        ("run_started", 0),
        ("epoch", 1),
        ("seed_stage", 1),
        ("epoch", 2),
        ("run_finished", 2),
    ]
    lines = [json.dumps({"event": event, "epoch": epoch}) for event, epoch in events]
    for epoch, kept in ((2, 4), (1, 3), (0, 0)):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "ep')
        cut_back(tmp_path, epoch)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:kept]


def test_config_of_checkpoints_is_checked() -> None:
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            CheckpointConfig(**wrong)
    assert replace(CheckpointConfig(), every=3).every == 3
