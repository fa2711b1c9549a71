"""A run in a directory of its own, with config, metrics, checkpoints, network, baseline and report.

`cli` calls `run_job`, and so do the functions of `start` where they are given a directory.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esper_train.base.stop import Stopped, StopRequest
from esper_train.config import RunConfig
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Policy
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.run.checkpoint import Beside, Checkpoints, load, restore, saved
from esper_train.run.directory import (
    BASELINE,
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS,
    POLICY,
    claimed,
    create,
    cut_back,
    load_config,
    save_network,
    write_file,
)
from esper_train.run.episode import Episode
from esper_train.run.profile import write_profile
from esper_train.run.report import write_report
from esper_train.run.report.draw import require_matplotlib
from esper_train.run.run import (
    EpisodeResult,
    PolicyMaker,
    episode_configs,
    prepare,
    run_episode,
    run_started,
)
from esper_train.tasks import TASKS, Task, task_of_run
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.loggers import logger_makers
from esper_train.telemetry.sinks import JsonlSink, Sink
from esper_train.train.ranks import joined


def episode_name(number: int) -> str:
    """The directory of an episode, counted from 1, among several in one directory."""
    return f"episode-{number}"


def _silent(words: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run in a directory: everything besides its config, and how it is shown."""

    mode: str
    """"heuristic" or "fit"."""
    task: Task | None = None
    """A task of one's own; None is the task that the config names."""
    policy: Policy | PolicyMaker | None = None
    policy_file: bytes | None = None
    """The contents of the policy file that is written beside the run, so that a resumed run has the
    same policy."""
    registry: BlueprintRegistry | None = None
    hub: TelemetryHub | None = None
    resume: bool = False
    baseline: bool = True
    profile: bool = False
    say: Callable[[str], None] = _silent
    """Called with each line that the user should read."""
    display: Callable[[], Sink] | None = None
    """Makes the sink that shows the events of one run."""
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def growing(self) -> bool:
        return self.mode == "heuristic"


def run_job(
    config: RunConfig, job: Job, out: Path, *, numbered: bool = False
) -> list[EpisodeResult]:
    """Run every episode, each in a directory of its own where there are several.

    `numbered` makes a new directory, with a number at the end of its name where that is taken.

    Raises, beside the errors of a run:
        FileExistsError: `out` is there and not empty, and `job.resume` is false, or it holds
            something else than a run.
        BlockingIOError: another process writes to `out`.
        ValueError: `out` is resumed with another task, or a task of one's own has the name of one
            of the package.
        ImportError: the report could not be drawn.
    """
    require_matplotlib()
    config = _with_own_name(config, job.task)
    if job.resume and (out / CONFIG).is_file():
        task_of_run(load_config(out).task, config.task_config(), job.task)
    if config.distributed.strategy != "none" and job.profile:
        raise ValueError("a profile is made in one process; leave out distributed.strategy")
    with joined(config.distributed, config.device, job.stop) as ranks, _signals(job.stop):
        if ranks is not None and not ranks.first:
            return [_run_beside(each, job) for each in episode_configs(config)]
        return _run_all(config, job, out, numbered=numbered)


def _run_all(config: RunConfig, job: Job, out: Path, *, numbered: bool) -> list[EpisodeResult]:
    with claimed(out, resume=job.resume, numbered=numbered) as out:
        if job.resume:
            _refuse_other_files(out)
        try:
            return _run_claimed(config, job, out)
        except Stopped:
            if (out / CONFIG).is_file():
                job.say(f"stopped; --resume {out} goes on with it (from Python, resume=True)")
            raise


def _run_claimed(config: RunConfig, job: Job, out: Path) -> list[EpisodeResult]:
    if config.episodes == 1:
        return [_run_in(out, config, job)]
    results = []
    for number, each in enumerate(episode_configs(config), start=1):
        directory = out / episode_name(number)
        with claimed(directory, resume=job.resume):
            results.append(_run_in(directory, each, job, whole=config))
    return results


def _refuse_other_files(out: Path) -> None:
    """`FileExistsError` for a directory to resume in which there are files, but no run."""
    names = {entry.name for entry in out.iterdir()} - {LOCK}
    if names and not names & {CONFIG, episode_name(1)}:
        raise FileExistsError(
            f"{out} holds no run to resume: it has no {CONFIG}, but {min(names)}; choose another "
            "directory"
        )


def _with_own_name(config: RunConfig, task: Task | None) -> RunConfig:
    """The config as the directory will have it, with the name of the user's task."""
    if task is None:
        return config
    if task.name in TASKS:
        raise ValueError(
            f"a task of your own is named {task.name!r}, as a task of this package; give it a name "
            "of its own, by which the run's directory can tell them apart"
        )
    return replace(config, task=task.name)


def _signals(stop: StopRequest) -> AbstractContextManager[object]:
    """Let signals end the run after a whole batch, unless the caller listens already. Only the main
    thread can listen."""
    if stop.listening or threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return stop


def _run_in(
    directory: Path, config: RunConfig, job: Job, whole: RunConfig | None = None
) -> EpisodeResult:
    """One run in its directory, and its baseline. `whole` is what the directory of several is to be
    resumed with."""
    loggers = logger_makers(config.telemetry)
    episode = _prepared(config, job)
    checkpoints = saved(directory / CHECKPOINTS) if job.resume else []
    state = load(checkpoints[-1], directory / METRICS) if checkpoints else None
    _restore(episode, state)
    # whatever cannot work was refused above, before anything is written
    if whole is not None:
        create(directory.parent, whole)
    create(directory, config)
    if isinstance(episode.policy, HeuristicTamiyo):
        reason = episode.policy.too_short(config.max_epochs)
        if reason is not None:
            job.say(reason)
    if job.policy_file is not None:
        write_file(directory / POLICY, job.policy_file)
    if job.profile:
        slots = config.slots if job.growing else ()
        job.say(write_profile(config, slots, directory, task=job.task))
    for make in loggers:
        episode.hub.add(make(directory, episode.epoch if job.resume else None))
    try:
        result = _run_episode(episode, directory, job)
        del episode  # its worker processes end here
        if job.growing and job.baseline:
            plain = _plain(job)
            with claimed(directory / BASELINE, resume=job.resume):
                _run_in(directory / BASELINE, config, plain)
    finally:
        job.say(f"report: {write_report(directory)}")
    return result


def _run_beside(config: RunConfig, job: Job) -> EpisodeResult:
    """Take part in the run as a rank other than the first, with nothing on disk."""
    episode = _prepared(config, job)
    _restore(episode, None)
    sharded = episode.sharded
    result = run_episode(episode, Beside() if sharded else None)
    if sharded:
        episode.whole(episode.model.state_dict())  # which rank 0 writes
    episode.hub.close()
    del episode  # its worker processes end here
    if job.growing and job.baseline:
        _run_beside(config, _plain(job))
    return result


def _prepared(config: RunConfig, job: Job) -> Episode:
    episode = prepare(
        config,
        job.mode,
        task=job.task,
        policy=job.policy,
        hub=job.hub or TelemetryHub((), config.telemetry),
        registry=job.registry,
    )
    episode.stop = job.stop
    if episode.ranks is not None:
        episode.ranks.stop = job.stop
    return episode


def _plain(job: Job) -> Job:
    """The baseline of a job that grows a network."""
    return replace(job, mode="fit", policy=None, policy_file=None, hub=None, profile=False)


def _restore(episode: Episode, state: Mapping[str, Any] | None) -> None:
    """Bring the episode to the state of the checkpoint that rank 0 read, if it read one."""
    if episode.ranks is not None:
        state = episode.ranks.from_first(state)
    if state is not None:
        restore(state, episode)


def _run_episode(episode: Episode, directory: Path, job: Job) -> EpisodeResult:
    """One run, from its start or from where it was restored. The network is written however it
    ends, unless it is divided among ranks, which may be gone."""
    cut_back(directory, episode.epoch)
    episode.hub.add(JsonlSink(directory / METRICS))
    display = job.display() if job.display is not None else None
    if display is not None:
        episode.hub.add(display)
    if episode.epoch:
        job.say(f"resuming after epoch {episode.epoch}")
        if display is not None:
            display.write(run_started(episode))
    done = False
    try:
        checkpoints = Checkpoints(directory / CHECKPOINTS, episode.config.checkpoint)
        result = run_episode(episode, checkpoints)
        done = True
        return result
    finally:
        episode.hub.close()
        if done or not episode.sharded:
            save_network(directory, episode.model, episode.whole(episode.model.state_dict()))
