"""The command `esper-train`: reads the config, runs, shows progress, and leaves a run directory
with a report.

Exit codes: 0 done, 2 something in the request, the data or the disk cannot work, 3 the losses went
bad, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by the loss of its terminal: such a run leaves a
checkpoint, and a second signal ends it at once. Only this module prints, and only it imports tyro
and rich.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from esper_kernels import KernelConfig
from esper_kernels import info as kernel_info
from esper_train.base.console import lasting_output
from esper_train.base.stop import Stopped, StopRequest
from esper_train.config import RunConfig, load_toml, preset
from esper_train.run.directory import load_config
from esper_train.run.job import Job, run_job
from esper_train.run.report import write_comparison, write_report
from esper_train.tasks import import_task, is_place
from esper_train.telemetry.progress import ProgressSink
from esper_train.telemetry.sinks import ConsoleSink, Sink
from esper_train.train.errors import BadNumbersError

USAGE = """usage: esper-train {heuristic,fit,report,info} [options]

  heuristic  grow a network under the heuristic controller (the main job)
  fit        train the same host without slots, by the same loop
  report     DIR: write its report anew; DIR DIR ... [--out FILE]: compare runs on one page
  info       versions, and which kernel backend serves what, and why

`esper-train heuristic --help` lists every option."""
EXIT_USAGE = 2
EXIT_BAD_NUMBERS = 3
EXIT_SIGNAL = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. It is the same where nobody reads what is printed."""
    with lasting_output():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given.pop(0) if given else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "info":
        print(kernel_info())
        return 0
    if command not in ("heuristic", "fit", "report"):
        print(f"{USAGE}\n\nesper-train: error: unknown command {command!r}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if command == "report":
            _report(given)
            return 0
        options = _parse(command, given)
        config = options.run_config()
        if options.resume is not None and options.out is not None:
            raise ValueError("--resume goes on in the directory that it names; leave --out out")
        with StopRequest() as stop:
            _run(config, command, stop, options)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGNAL + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    except BadNumbersError as error:
        print(f"esper-train: {error}", file=sys.stderr)
        return EXIT_BAD_NUMBERS
    except (
        ValueError,
        TypeError,
        IndexError,
        OSError,
        ImportError,
        RuntimeError,
        OverflowError,
    ) as error:
        print(f"esper-train: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


@dataclass(frozen=True, kw_only=True)
class _Options(RunConfig):
    """What the command line takes: a run's config, and what concerns the command alone."""

    config: str | None = None
    """A TOML file with any of these settings; options given beside it win."""
    out: str | None = None
    """Directory of the run, new or empty. None takes one under runs/, named by time, command and
    task."""
    resume: str | None = None
    """Directory of a run that was stopped or killed: go on from its newest checkpoint, with its own
    config."""
    backend: str | None = None
    """Kernel backend, short for --train.kernel.backend."""
    baseline: bool = True
    """With heuristic, also train the host without slots, for the report to compare with."""
    profile: bool = False
    """First profile a few batches, into profile.md and profile.json; the run itself is as
    without."""

    def run_config(self) -> RunConfig:
        run = RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
        if self.backend is None:
            return run
        return replace(run, train=replace(run.train, kernel=KernelConfig(backend=self.backend)))


def _parse(command: str, arguments: Sequence[str]) -> _Options:
    try:
        import tyro
    except ImportError as error:
        raise ImportError("this command needs tyro: pip install 'esper-kernels[train]'") from error
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.add_argument("--task")
    finder.add_argument("--resume")
    given = finder.parse_known_args(arguments)[0]
    task = given.task or (load_toml(given.config).task if given.config else RunConfig().task)
    run = load_config(Path(given.resume)) if given.resume is not None else preset(task)
    run = run if given.config is None else load_toml(given.config, base=run)
    default = _Options(**{f.name: getattr(run, f.name) for f in fields(RunConfig)})
    return tyro.cli(_Options, prog=f"esper-train {command}", args=arguments, default=default)


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="esper-train report")
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="directory of a run"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="of several: the page to write"
    )
    given = parser.parse_args(arguments)
    one = len(given.directories) == 1
    if one:
        page = write_report(*given.directories)
    else:
        page = write_comparison(given.directories, given.out)
    print(f"report: {page}")


def _run(config: RunConfig, mode: str, stop: StopRequest, options: _Options) -> None:
    task = import_task(config.task) if is_place(config.task) else None
    name = task.name if task else config.task
    out = options.out if options.resume is None else options.resume
    job = Job(
        mode=mode,
        task=task,
        resume=options.resume is not None,
        baseline=options.baseline,
        profile=options.profile,
        say=print,
        display=_display,
        stop=stop,
    )
    new = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{mode}-{name}"
    run_job(config, job, Path(new if out is None else out), numbered=out is None)


def _display() -> Sink:
    """What shows events: a progress bar on a terminal, lines elsewhere."""
    return ProgressSink() if sys.stdout.isatty() else ConsoleSink()
