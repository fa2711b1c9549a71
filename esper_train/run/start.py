"""Start a run from Python: `run_heuristic_episode`, `train_heuristic` and `run_fit`.

With `out`, a run leaves in that directory all that the command leaves there.
"""

from dataclasses import replace
from pathlib import Path

from esper_train.base.names import require_type
from esper_train.config import RunConfig
from esper_train.control.policy import Policy
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.run.job import Job, run_job
from esper_train.run.run import (
    EpisodeResult,
    PolicyMaker,
    episode_configs,
    prepare,
    run_episode,
)
from esper_train.tasks import Task
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import ConsoleSink
from esper_train.train.ranks import joined


def run_heuristic_episode(
    config: RunConfig,
    *,
    task: Task | None = None,
    policy: Policy | PolicyMaker | None = None,
    hub: TelemetryHub | None = None,
    registry: BlueprintRegistry | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    baseline: bool = True,
) -> EpisodeResult:
    """Grow a network under a controller, the heuristic one unless another is given.

    Args:
        config: the run's settings; its `episodes` are for `train_heuristic`.
        task: a task of your own; None takes the one that `config.task` names.
        policy: the controller, or a function that makes it for the network.
        hub: where events go. With `out`, further sinks are added to it, and it is closed at the
            end.
        registry: the blueprints, in place of the package's and the task's own.
        out: a directory, new or empty, for config, metrics, checkpoints, network, baseline and
            report; progress is printed, and the first signal (Ctrl-C, SIGTERM) ends the run after a
            whole batch. None leaves nothing on disk.
        resume: continue the run in `out` from its newest checkpoint; where `out` is new or empty,
            the run starts. The config must be that of the run, and `task` have the same name.
        baseline: with `out`, also train the host without slots, for the report.

    Raises:
        ValueError: no slots, unknown or repeated ones, or bad data.
        BadNumbersError: the losses went bad; `NonFiniteLossError` where they are NaN or infinite.
        FileExistsError: `out` is not empty, or, with `resume`, holds something else than a run.
        BlockingIOError: another process writes to `out`.
    """
    require_type(config, RunConfig, "config")
    if config.episodes != 1 and out is not None:
        raise ValueError(
            f"run_heuristic_episode is one episode, got episodes={config.episodes}; use "
            "train_heuristic"
        )
    job = Job(
        mode="heuristic",
        task=task,
        policy=policy,
        hub=hub,
        registry=registry,
        resume=resume,
        baseline=baseline,
    )
    return _run(config, job, out)[0]


def train_heuristic(
    config: RunConfig,
    *,
    task: Task | None = None,
    hub: TelemetryHub | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    baseline: bool = True,
) -> list[EpisodeResult]:
    """`config.episodes` runs one after the other, with the seeds seed, seed + 1000, ..., otherwise
    as `run_heuristic_episode`. With `out` and several, each has a directory in it."""
    require_type(config, RunConfig, "config")
    job = Job(mode="heuristic", task=task, hub=hub, resume=resume, baseline=baseline)
    if out is None:
        return [result for each in episode_configs(config) for result in _run(each, job, None)]
    return _run(config, job, out)


def run_fit(
    config: RunConfig,
    *,
    task: Task | None = None,
    hub: TelemetryHub | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> EpisodeResult:
    """Train the same host without slots, by the same loop; otherwise as `run_heuristic_episode`."""
    return _run(config, Job(mode="fit", task=task, hub=hub, resume=resume), out)[0]


def _run(config: RunConfig, job: Job, out: str | Path | None) -> list[EpisodeResult]:
    require_type(config, RunConfig, "config")
    require_type(job.task, Task, "task", or_none=True)
    require_type(job.hub, TelemetryHub, "hub", "pass TelemetryHub([sink])", or_none=True)
    require_type(job.registry, BlueprintRegistry, "registry", or_none=True)
    require_type(job.resume, bool, "resume")
    require_type(job.baseline, bool, "baseline")
    if out is not None:
        return run_job(config, replace(job, say=print, display=ConsoleSink), Path(out))
    if job.resume:
        raise ValueError("resume=True continues the run in a directory: name it with out=...")
    with joined(config.distributed, config.device, job.stop):
        episode = prepare(
            config, job.mode, task=job.task, policy=job.policy, hub=job.hub, registry=job.registry
        )
        return [run_episode(episode)]
