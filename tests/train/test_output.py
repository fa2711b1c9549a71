"""Commands whose output nobody reads do all of their work and end with their own exit code."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_train import cli
from esper_train.base.console import Lasting, lasting_output
from esper_train.run.directory import read_metrics
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import ConsoleSink

FIT = "fit --task synthetic --max-epochs 3 --max-batches 2 --episodes 2 --out run"
FULL = pytest.param(
    "{} > /dev/full",
    id="full disk",
    marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full"),
)


def shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `esper` is the command; the code is that of the command, not that
    of a reader."""
    script = f'{sys.executable} -c "from esper_train.cli import main; raise SystemExit(main())"'
    text = f'set -o pipefail; cd {directory}; esper() {{ {script} "$@"; }}; {line}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        pytest.param("{} | head -1", id="head"),
        pytest.param("{} >&-", id="closed stdout"),
        FULL,
        pytest.param("{} >&- 2>&- <&-", id="all closed"),
        pytest.param("{} 2>&1 | true", id="nobody reads either"),
    ],
)
def test_a_run_goes_on_without_a_console(form: str, tmp_path: Path) -> None:
    done = shell(form.format(f"esper {FIT}"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for number in (1, 2):
        events = read_metrics(tmp_path / "run" / f"episode-{number}")
        assert [e["event"] for e in events] == [
            "run_started",
            "epoch",
            "epoch",
            "epoch",
            "run_finished",
        ]
        assert events[-1]["status"] == "completed"
        assert (tmp_path / "run" / f"episode-{number}" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "command", "code"),
    [
        ("{} | true", "info", 0),
        ("{} | true", "--help", 0),
        ("{} > /dev/full", "--help", 0),
        ("{} | true", "fit --help", 0),
        ("{} >&-", "report run", 2),
        ("{} 2>&1 | true", "plant", 2),
        ("{} 2> /dev/full", "fit --task nothing", 2),
    ],
)
def test_other_commands_keep_their_code_and_say_nothing_else(
    form: str, command: str, code: int, tmp_path: Path
) -> None:
    done = shell(form.format(f"esper {command}"), tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [Broken(), None])
def test_a_run_in_this_process_goes_on(
    stream: io.StringIO | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main([*FIT.split()[:-1], str(tmp_path / "run")]) == 0
    for number in (1, 2):
        assert read_metrics(tmp_path / "run" / f"episode-{number}")[-1]["status"] == "completed"
    assert cli.main(["info"]) == 0
    assert cli.main(["plant"]) == 2
    assert sys.stdout is stream


def test_a_stream_that_fails_takes_everything_and_keeps_its_other_answers() -> None:
    stream = Lasting(Broken())
    assert stream.write("text") == 4
    stream.flush()
    assert stream.isatty() is False
    closed = io.StringIO()
    closed.close()
    print("text", file=Lasting(closed))  # type: ignore[arg-type]


def test_what_an_encoding_lacks_is_written_in_its_escaped_form() -> None:
    raw = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("task 桜")
    stream.flush()
    assert raw.getvalue() == b"task \\u685c"


def test_standard_streams_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout
    with lasting_output():
        assert sys.stdout is not before
    assert sys.stdout is before


def test_a_failing_sink_ends_no_training_though_standard_error_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken())
    hub = TelemetryHub([ConsoleSink(Broken())])
    hub.emit(Event(EventType.BAD_TARGETS, 1, {"message": "one row"}))
    assert not hub.collects(EventType.RUN_FINISHED)


QUICK = "--task synthetic --max-epochs 2 --max-batches 1"
PPO = (
    f"ppo {QUICK} --rl.hosts 2 --rl.rollout 2 --rl.batch 4 --rl.passes 1 --rl.evaluations 1 "
    "--rl.steps 4 --out policy"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "command", "written"),
    [
        ("{} 2>&-", PPO, "policy/policy.pt"),
        ("{} | true", f"grow {QUICK} --out run", "run/baseline/network.pt"),
        ("{} > /dev/full 2> /dev/full", "report one two --out both.html", "both.html"),
    ],
    ids=["ppo", "grow", "report"],
)
def test_every_command_that_writes_files_goes_on_without_a_console(
    form: str, command: str, written: str, tmp_path: Path
) -> None:
    """`fit` is tested with more forms above."""
    if "/dev/full" in form and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    if command.startswith("report"):
        for name in ("one", "two"):
            assert cli.main(["fit", *QUICK.split(), "--out", str(tmp_path / name)]) == 0
    done = shell(form.format(f"esper {command}"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / written).exists()
