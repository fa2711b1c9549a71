"""The command `esper-train`: reads the config, runs, shows progress and leaves a run directory.

Exit codes: 0 done; 2 bad arguments, bad data or an I/O error; 3 the losses went bad; 130 stopped by
Ctrl-C, 143 by SIGTERM, 129 by the loss of its terminal. A stopped run leaves a checkpoint, and a
second signal ends it at once. Only this module prints, and only it needs the extra `train`: each
command imports the packages that it uses, so that `info` works beside torch alone.
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import NoReturn

from esper_kernels import KernelConfig, __version__
from esper_kernels import info as kernel_info
from esper_train.base.console import lasting_output
from esper_train.base.names import unknown_name
from esper_train.base.stop import Stopped, StopRequest
from esper_train.config import RunConfig, load_toml, preset
from esper_train.rl.learned import SavedPolicy, load_policy
from esper_train.run.directory import METRICS, POLICY, load_config, runs_in
from esper_train.run.job import Job, run_job
from esper_train.run.report import write_comparison, write_report
from esper_train.run.report.history import read_history
from esper_train.tasks import import_task, is_place
from esper_train.telemetry.sinks import ConsoleSink, Sink
from esper_train.train.errors import BadNumbersError

USAGE = """usage: esper-train {grow,fit,ppo,report,info} [options]

  grow       grow a network under a controller: the heuristic one, or a learned --policy
  fit        train the same host without slots, by the same loop
  ppo        train a policy that `grow` can use, by PPO
  report     write the report of a run again, or compare runs on one page
  info       versions, and which kernel backend serves what, and why

`esper-train grow --help` lists the main options, and `esper-train grow --help-all` every setting.
`esper-train --version` prints the version. For completion with the Tab key in bash, once:
esper-train --completion bash > ~/.local/share/bash-completion/completions/esper-train
`esper-train heuristic` is the earlier name of grow.
grow, fit, ppo and report need the extra: pip install 'esper-kernels[train]'
ppo also needs: pip install 'esper-kernels[rl]'"""
DESCRIPTIONS = {
    "grow": "Grow a network under the heuristic controller, or under a learned policy.",
    "fit": "Train the same host network without slots, by the same loop.",
    "ppo": "Train a policy by PPO, on many hosts; the settings under rl are its own.",
}
EXIT_USAGE = 2
EXIT_BAD_NUMBERS = 3
EXIT_SIGNAL = 128
REFUSALS = (
    ValueError,
    TypeError,
    IndexError,
    OSError,
    ImportError,
    RuntimeError,
    OverflowError,
)
"""Errors of bad arguments, bad data and I/O, which are reported in one line without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, which is the same if nobody reads the output.

    None takes the arguments of the process, which the caller then ends with that code.
    """
    ends_process = arguments is None
    with lasting_output():
        code = _main(
            list(sys.argv[1:] if arguments is None else arguments),
            StopRequest(ends_process=ends_process),
        )
    if ends_process and "RANK" in os.environ:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End a process that a launcher started as one of several, without shutting Python down.

    FSDP2 keeps the process group and with it gloo's threads. Before Python 3.14, one that frees a
    tensor while Python shuts down aborts the process, and `torchrun` would count a finished run as
    failed.
    """
    logging.shutdown()
    os._exit(code)


def _main(arguments: list[str], stop: StopRequest) -> int:
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"esper-train {__version__}")
        return 0
    if command == "--completion":
        _completion(arguments)
        return 0
    if command == "heuristic":
        command = "grow"
    if command not in (known := ("grow", "fit", "ppo", "report", "info")):
        error = unknown_name("command", command, known)
        print(f"{USAGE}\n\nesper-train: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        _dispatch(command, arguments, stop)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGNAL + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    except BadNumbersError as error:
        print(f"esper-train: {error}", file=sys.stderr)
        return EXIT_BAD_NUMBERS
    except REFUSALS as error:
        print(f"esper-train: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _dispatch(command: str, arguments: Sequence[str], stop: StopRequest) -> None:
    if command == "info":
        _info(arguments)
    elif command == "report":
        _report(arguments)
    else:
        options = _parse(command, arguments)
        config = options.run_config()
        if options.resume is not None and options.out is not None:
            raise ValueError("--resume continues in the directory that it names; leave out --out")
        with stop:
            if command == "ppo":
                _ppo(config, stop, options)
            else:
                _run(config, command, stop, options)


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig):
    """The settings of a run, which `--config` takes too, and seven options of the command
    itself."""

    config: str | None = None
    """A TOML file with settings of the run; options on the command line override it."""
    out: str | None = None
    """Directory of the run, new or empty. None takes one under runs/, named by time, command and
    task."""
    resume: str | None = None
    """Directory of a run that was stopped or killed: continue from its newest checkpoint, with its
    own config."""
    backend: str | None = None
    """Kernel backend; short for --train.kernel.backend."""
    baseline: bool = True
    """For grow: also train the host without slots, so that the report can compare."""
    policy_file: str | None = None
    """For grow, in place of the heuristic: a policy that `esper-train ppo` trained. --policy FILE
    is the same."""
    profile: bool = False
    """First profile a few batches into profile.md and profile.json. It does not change the run."""

    def run_config(self) -> RunConfig:
        run = RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
        if self.backend is None:
            return run
        return replace(run, train=replace(run.train, kernel=KernelConfig(backend=self.backend)))


def _parse(command: str, arguments: Sequence[str]) -> Options:
    _require_packages(command, "tyro", "rich", "matplotlib")
    import tyro

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.add_argument("--task")
    finder.add_argument("--resume")
    given = finder.parse_known_args(arguments)[0]
    arguments = [  # the settings of the heuristic have the name "policy"
        re.sub("^--policy(?=$|=)", "--policy-file", argument) for argument in arguments
    ]
    task = given.task or (load_toml(given.config).task if given.config else RunConfig().task)
    run = load_config(Path(given.resume)) if given.resume is not None else preset(task)
    run = run if given.config is None else load_toml(given.config, base=run)
    options = Options
    if "--help-all" in arguments:
        arguments = ["--help"]
    elif not {"-h", "--help"}.isdisjoint(arguments):
        options = _main_options()
    return tyro.cli(
        options,
        prog=f"esper-train {command}",
        description=f"{DESCRIPTIONS[command]} --help-all lists every setting.",
        args=arguments,
        default=options(**{f.name: getattr(run, f.name) for f in fields(RunConfig)}),
    )


def _main_options() -> type[Options]:
    """The options without those of the tables of settings, for the first page of help."""
    import tyro

    tables = [
        (f.name, tyro.conf.Suppress[f.type], field(default_factory=f.default_factory))  # type: ignore[misc, name-defined]
        for f in fields(RunConfig)
        if is_dataclass(f.type)
    ]
    return make_dataclass("_MainOptions", tables, bases=(Options,), frozen=True, kw_only=True)


@dataclass(frozen=True)
class _NoOptions:
    """Stands for the arguments of `report` and `info`, which shell completion does not offer."""


def _completion(arguments: Sequence[str]) -> None:
    """Print a script that completes commands and options, for the shell that is named."""
    parser = argparse.ArgumentParser(prog="esper-train --completion")
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    shell = parser.parse_args(arguments).shell
    _require_packages("--completion", "tyro")
    import tyro

    commands = {name: Options() for name in DESCRIPTIONS}
    others = {"report": _NoOptions(), "info": _NoOptions()}
    every = tyro.extras.subcommand_type_from_defaults({**commands, **others})
    tyro.cli(every, prog="esper-train", args=["--tyro-print-completion", shell])


def _require_packages(command: str, *packages: str) -> None:
    """Refuse a command whose packages are missing before it does anything."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{command} needs {', '.join(missing)}: pip install 'esper-kernels[train]'"
        )


def _info(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="esper-train info",
        description="Show versions, and which kernel backend serves what, and why.",
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    as_json = parser.parse_args(arguments).json
    found = kernel_info()
    print(json.dumps(asdict(found), indent=2) if as_json else found)


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="esper-train report",
        description="Write the report of one run again, or a page that compares several runs.",
    )
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directory of a run, or a folder of runs",
    )
    parser.add_argument(
        "--out", type=Path, help="page that compares several runs (default: comparison.html)"
    )
    given = parser.parse_args(arguments)
    _require_packages("report", "matplotlib")
    runs = [run for directory in given.directories for run in runs_in(directory)]
    if runs == given.directories[:1]:
        if given.out is not None:
            raise ValueError("--out names a page that compares several runs, and there is only one")
        if read_history(runs[0]) is None:
            raise ValueError(f"nothing to report: {runs[0] / METRICS} holds no run yet")
        page = write_report(runs[0])
    else:
        page = write_comparison(runs, given.out or Path("comparison.html"))
    print(f"report: {page}")


def _run(config: RunConfig, command: str, stop: StopRequest, options: Options) -> None:
    task = import_task(config.task) if is_place(config.task) else None
    name = task.name if task else config.task
    out = options.out if options.resume is None else options.resume
    mode = "heuristic" if command == "grow" else command
    policy = _policy(command, options)
    job = Job(
        mode=mode,
        task=task,
        policy=None if policy is None else policy.maker(config),
        policy_file=None if policy is None else policy.to_bytes(),
        resume=options.resume is not None,
        baseline=options.baseline,
        profile=options.profile,
        say=print,
        display=_display,
        stop=stop,
    )
    new = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{mode}-{name}"
    run_job(config, job, Path(new if out is None else out), numbered=out is None)


def _policy(command: str, options: Options) -> SavedPolicy | None:
    """The policy named, or the one that a resumed run began with; None is the heuristic."""
    named = options.policy_file
    if named is not None:
        if command != "grow" or options.resume is not None:
            raise ValueError(
                "--policy is for a new run of `grow`: a resumed one has its policy in its "
                "directory, and fit has none"
            )
        return load_policy(Path(named))
    kept = sorted(Path(options.resume).rglob(POLICY)) if options.resume is not None else []
    return load_policy(kept[0]) if kept else None


def _ppo(config: RunConfig, stop: StopRequest, options: Options) -> None:
    if options.policy_file is not None or options.profile:
        raise ValueError("--policy and --profile are for other commands than ppo; leave them out")
    task = import_task(config.task) if is_place(config.task) else None
    name = task.name if task else config.task
    out = options.out if options.resume is None else options.resume
    directory = Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-ppo-{name}" if out is None else out)
    from esper_train.rl import train_ppo

    resume = options.resume is not None
    train_ppo(config, directory, task=task, resume=resume, say=print, stop=stop)
    print(f"policy: {directory / POLICY}")


def _display() -> Sink:
    """The sink that shows events: a progress bar on a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        return ConsoleSink()
    from esper_train.telemetry.progress import ProgressSink

    return ProgressSink()
