"""Checkpoints and metrics that were damaged, cut short or forged are refused, with a way out."""

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esper_train.run.checkpoint import load, save
from tests.helpers.growing_run import reported, resume
from tests.helpers.stopped import contents, stopped_after

pytestmark = pytest.mark.usefixtures("without_pictures")


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
    """The digest is as if someone had made it to fit; bits flipped in tensors cannot be told then,
    so they are left out."""
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


@pytest.mark.parametrize("damage", ["twice", "swapped"])
def test_metrics_that_have_an_epoch_twice_or_out_of_order_are_refused(
    damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stopped_after(7, whole, tmp_path / "run")
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if b'"event": "epoch"' in line]
    second, third = places[1:3]
    if damage == "twice":
        lines.insert(second, lines[second])
    else:
        lines[second], lines[third] = lines[third], lines[second]
    metrics.write_bytes(b"".join(lines))
    before = contents(directory)
    assert resume(directory) == 2
    assert "has epoch 2 after epoch" in capsys.readouterr().err
    assert contents(directory) == before


def test_metrics_cut_to_an_older_checkpoint_are_gone_on_from(whole: Path, tmp_path: Path) -> None:
    """The refusal names this way out: the newer checkpoints are removed first."""
    directory = stopped_after(3, whole, tmp_path / "run")
    size = load(directory / "checkpoints" / "epoch-3.pt")["metrics"]
    os.truncate(directory / "metrics.jsonl", size)
    assert resume(directory) == 0
    assert reported(directory) == reported(whole)


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
