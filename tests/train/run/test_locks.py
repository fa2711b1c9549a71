"""Two processes and one run directory: one writes, and the other is told which process that is."""

import subprocess
import sys
from pathlib import Path

import pytest

from esper_train import cli
from esper_train.run.directory import claimed

pytestmark = pytest.mark.usefixtures("without_pictures")

QUICK = ["--task", "synthetic", "--max-epochs", "2", "--max-batches", "2"]
HOLD = """
import sys, os
from pathlib import Path
from esper_train.run.directory import claimed
with claimed(Path(sys.argv[1]), resume=True):
    if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives its run
        print("ready", flush=True)
        sys.stdin.read()
        os._exit(0)
    if len(sys.argv) == 2:
        print("ready", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("way", ["--resume", "--out"])
def test_a_directory_in_use_is_refused_and_names_the_process(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if way == "--resume":
        assert cli.main(["fit", *QUICK, "--out", str(run)]) == 0
    with holder(run) as process:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert cli.main(["fit", *([] if way == "--resume" else QUICK), way, str(run)]) == 2
        assert f"in use by process {process.pid}; wait for it" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        process.communicate("")
    assert not (run / ".lock").exists()
    assert cli.main(["fit", *([] if way == "--resume" else QUICK), way, str(run)]) == 0


@pytest.mark.parametrize("part", [".", "baseline", "episode-2"])
def test_each_directory_of_a_run_is_in_use(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--episodes", "2", "--no-baseline"] if part == "episode-2" else []
    arguments = ["heuristic", *QUICK, *more, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    with claimed(tmp_path / "run" / part, resume=True):
        assert cli.main(["heuristic", *more, "--resume", str(tmp_path / "run")]) == 2
    assert "in use by process" in capsys.readouterr().err


def test_a_killed_process_frees_its_directory_though_its_workers_live(tmp_path: Path) -> None:
    process = holder(tmp_path / "run", "with a worker")
    try:
        with (
            pytest.raises(BlockingIOError, match=f"in use by process {process.pid}"),
            claimed(tmp_path / "run"),
        ):
            pass
        process.kill()
        process.wait()
        with claimed(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").exists()
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    finally:
        process.communicate("")


def test_one_process_does_not_claim_a_directory_twice(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"), pytest.raises(BlockingIOError), claimed(tmp_path / "run"):
        pass


def test_names_that_collide_get_a_number(tmp_path: Path) -> None:
    """Each holds its directory while the next one comes; what stayed empty is gone afterwards."""
    path = tmp_path / "runs" / "20260101-000000-fit-digits"
    with (
        claimed(path, numbered=True) as first,
        claimed(path, numbered=True) as second,
        claimed(path, numbered=True) as third,
    ):
        assert [each.name for each in (first, second, third)] == [
            path.name,
            f"{path.name}-2",
            f"{path.name}-3",
        ]
    assert list(tmp_path.iterdir()) == []


def test_runs_without_a_name_that_start_in_the_same_second_are_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.time, "strftime", lambda form: "20260101-000000")
    for _ in range(2):
        assert cli.main(["fit", *QUICK]) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["20260101-000000-fit-synthetic", "20260101-000000-fit-synthetic-2"]


def test_a_directory_that_was_there_and_empty_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []
