"""Runs with worker processes, stopped as shells, schedulers and out-of-memory killers do it,
then resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import active_children, connection
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from esper_train import cli
from esper_train.base.stop import StopRequest
from esper_train.base.workers import WorkerLoader
from esper_train.run.checkpoint import load, saved
from esper_train.run.directory import read_metrics
from tests.helpers.growing_run import config_file, reported, resume

pytestmark = pytest.mark.usefixtures("without_pictures")

EPOCHS = 24
MAIN = "import sys; from esper_train.cli import main; sys.exit(main())"
KINDS = ["term group", "int group", "term main", "int main", "hup group", "twice", "kill worker"]


def options(directory: Path, workers: int) -> list[str]:
    directory.parent.mkdir(exist_ok=True)
    file = config_file(directory.parent)
    length = ["--max-epochs", str(EPOCHS), "--workers", str(workers)]
    return ["heuristic", "--no-baseline", "--config", file, *length, "--out", str(directory)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops, without workers, which change no number."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(options(directory, workers=0)) == 0
    return directory


def launch(directory: Path) -> subprocess.Popen[str]:
    """The run in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *options(directory, workers=2)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        start_new_session=True,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


def lines(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop(process: subprocess.Popen[str], kind: str, draw: random.Random) -> int:
    """Stop the run, and return the code with which it is to end."""
    if kind == "kill worker":
        os.kill(draw.choice(children(process)), signal.SIGKILL)
        return 2
    number = {"term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}.get(
        kind[:3].strip(), signal.SIGTERM
    )
    if kind.endswith("main"):
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    if kind == "twice":  # as `timeout` does
        process.send_signal(number)
    return 128 + number


def stop_and_resume(kind: str, seed: int, whole: Path, directory: Path) -> None:
    """Stop a run at a seeded moment; look at what it left; go on and compare with the run that
    nobody stopped."""
    draw = random.Random(f"{kind} {seed}")
    moment = draw.randrange(2, 10)
    with launch(directory) as process:
        try:
            while lines(directory) < moment and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            expected = stop(process, kind, draw)
            stderr = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == expected, stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert ("a process that prepares batches died" if expected == 2 else "interrupted") in stderr
    assert len(stderr.splitlines()) == 1
    assert not list(directory.rglob("*.new"))
    last = read_metrics(directory)[-1]
    assert (last["event"], last["status"]) == (
        "run_finished",
        "failed" if expected == 2 else "interrupted",
    )
    whole_epochs = sum(event["event"] == "epoch" for event in read_metrics(directory))
    newest = saved(directory / "checkpoints")[-1]
    assert load(newest)["parts"]["episode"]["epoch"] == whole_epochs
    assert resume(directory, "--workers", "0") == 0
    assert reported(directory) == reported(whole)
    ours, theirs = (
        torch.load(d / "network.pt", weights_only=True)["weights"] for d in (directory, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds workers by /proc, which is Linux's"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_workers_is_stopped_without_loss(kind: str, whole: Path, tmp_path: Path) -> None:
    stop_and_resume(kind, 0, whole, tmp_path / "stopped" / "run")


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds workers by /proc, which is Linux's"
)
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_workers_is_stopped_without_loss_ten_times(
    kind: str, whole: Path, tmp_path: Path
) -> None:
    for seed in range(1, 11):
        stop_and_resume(kind, seed, whole, tmp_path / str(seed) / "run")


def loader(workers: int = 2) -> WorkerLoader:
    data = TensorDataset(torch.arange(6.0).reshape(3, 2))
    return WorkerLoader(data, [[0], [1, 2]], workers)


@pytest.fixture
def child_handler() -> Iterator[None]:
    """The handler of SIGCHLD is put back afterwards; torch sets its own once in a process."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_dead_worker_is_noticed_where_a_batch_is_waited_for_and_nowhere_else(
    child_handler: None,
) -> None:
    others = active_children()
    batches = loader()
    assert [batch[0].tolist() for batch in batches] == [[[0, 1]], [[2, 3], [4, 5]]]
    victim = next(each for each in active_children() if each not in others)
    victim.kill()
    connection.wait([victim.sentinel], timeout=60)
    time.sleep(0.01)  # the handler runs here, as it would while a checkpoint is written
    with pytest.raises(
        ChildProcessError, match=r"a process that prepares batches died .*; if memory ran out"
    ):
        list(batches)


def test_an_error_of_the_data_is_no_dead_worker(child_handler: None) -> None:
    broken = WorkerLoader(TensorDataset(torch.zeros(1)), [[5]], 1)
    with pytest.raises(IndexError):
        list(broken)


def test_workers_ignore_just_the_signals_that_their_run_answers(child_handler: None) -> None:
    """SIGTERM ends the workers of a process that does not answer it itself."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for answers in (True, False):
        others = active_children()
        with StopRequest() if answers else nullcontext():
            batches = loader(1)
            list(batches)
            (worker,) = (each for each in active_children() if each not in others)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
            if answers:
                assert len(list(batches)) == 2
            else:
                assert connection.wait([worker.sentinel], timeout=60)
        del batches


IN_A_THREAD = """
import threading

from tests.train.run.test_signals import loader

taken = []
thread = threading.Thread(target=lambda: taken.extend(loader(1)))
thread.start()
thread.join()
print(len(taken))
"""


def test_a_data_loader_of_another_thread_is_served() -> None:
    """The test runs in a process of its own: workers forked beside whatever threads earlier tests
    have left, with the locks that these hold, may wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
