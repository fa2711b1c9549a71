"""The command `esper-train`: reads the config, runs, shows progress, and leaves a run directory with a report.

Exit codes: 0 done, 2 something in the request or the data cannot work, 3 the losses went bad,
130 interrupted. Only this module prints, and only it imports tyro and rich.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from esper_kernels import KernelConfig
from esper_kernels import info as kernel_info
from esper_train import run_directory
from esper_train.build import build_episode
from esper_train.config import RunConfig, load_toml
from esper_train.control.policy import Idle
from esper_train.episode import BadNumbersError, episode_configs, heuristic_policy, require_slots, run_episode
from esper_train.tasks import preset
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.loggers import logger_makers
from esper_train.telemetry.progress import ProgressSink
from esper_train.telemetry.report import write_comparison, write_report
from esper_train.telemetry.sinks import ConsoleSink, JsonlSink

USAGE = """usage: esper-train {heuristic,fit,report,info} [options]

  heuristic  grow a network under the heuristic controller (the main job)
  fit        train the same host without slots, by the same loop
  report     DIR: write its report anew; DIR DIR ... [--out FILE]: compare runs on one page
  info       versions, and which kernel backend serves what, and why

`esper-train heuristic --help` lists every option."""
EXIT_USAGE, EXIT_BAD_NUMBERS, EXIT_INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
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
        out = Path(options.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{command}-{config.task}")
        for number, episode_config in enumerate(episode_configs(config), start=1):
            directory = out if config.episodes == 1 else out / f"episode-{number}"
            _run(episode_config, directory, command, baseline=options.baseline)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BadNumbersError as error:
        print(f"esper-train: {error}", file=sys.stderr)
        return EXIT_BAD_NUMBERS
    except (ValueError, TypeError, IndexError, OSError, ImportError) as error:
        print(f"esper-train: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


@dataclass(frozen=True, kw_only=True)
class _Options(RunConfig):
    """What the command line takes: a run's config, and what concerns the command alone."""

    config: str | None = None
    """A TOML file with any of these settings; options given beside it win."""
    out: str | None = None
    """Directory of the run, new or empty. None takes one under runs/, named by time, command and task."""
    backend: str | None = None
    """Kernel backend, short for --train.kernel.backend."""
    baseline: bool = True
    """With heuristic, also train the host without slots, for the report to compare with."""

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
    given = finder.parse_known_args(arguments)[0]
    task = given.task or (load_toml(given.config).task if given.config else RunConfig().task)
    run = preset(task) if given.config is None else load_toml(given.config, base=preset(task))
    default = _Options(**{f.name: getattr(run, f.name) for f in fields(RunConfig)})
    return tyro.cli(_Options, prog=f"esper-train {command}", args=arguments, default=default)


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="esper-train report")
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of a run")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="of several: the page to write")
    given = parser.parse_args(arguments)
    one = len(given.directories) == 1
    print(f"report: {write_report(*given.directories) if one else write_comparison(given.directories, given.out)}")


def _run(config: RunConfig, directory: Path, mode: str, *, baseline: bool) -> None:
    """One run into its own directory. Network and report are written however it ends."""
    growing = mode == "heuristic"
    episode = build_episode(config, slots=require_slots(config) if growing else ())
    policy = heuristic_policy(episode) if growing else Idle()
    makers = logger_makers(config.telemetry)
    run_directory.create(directory, config)
    display = ProgressSink() if sys.stdout.isatty() else ConsoleSink()
    sinks = [JsonlSink(directory / run_directory.METRICS), *(make(directory) for make in makers), display]
    hub = TelemetryHub(sinks, config.telemetry)
    try:
        try:
            run_episode(episode, policy, hub, mode=mode)
        finally:
            hub.close()
            run_directory.save_network(directory, episode.model)
        if growing and baseline:
            _run(config, directory / run_directory.BASELINE, "fit", baseline=False)
    finally:
        print(f"report: {write_report(directory)}")
