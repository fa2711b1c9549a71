"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows,
epoch by epoch.

`job` calls `prepare` and `run_episode` for a run with a directory, `start` for one without. Plain
training is the same run with no slots and a controller that never acts.
"""

import time
from dataclasses import dataclass, field, replace

from esper_train.base.names import require_known
from esper_train.config import SEED_STEP, RunConfig
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Op, Policy
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Checkpoints
from esper_train.run.episode import Episode
from esper_train.run.epoch import Epoch, keep_good
from esper_train.run.records import plain
from esper_train.tasks import Task
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.train.errors import BadNumbersError, NonFiniteLossError
from esper_train.train.loop import evaluate
from esper_train.train.results import EvalResult, Measures


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """What came of a run."""

    accuracy: float
    """Validation accuracy after the last epoch, a fraction (0..1); NaN for a regression."""
    kept_epoch: int
    """The epoch whose network this is, by `config.keep`."""
    test: Measures
    """The test split, which no decision ever saw."""
    parameters: int
    fossils: int
    contributions: tuple[float, ...]
    """Measured contribution of each fossilized seed when it was kept, in percentage points."""
    action_counts: dict[str, int]
    rewards: tuple[float, ...]
    """Reward of each epoch's decision, of the kind that `config.reward` names."""
    refused: tuple[tuple[int, str, str], ...]
    """Decisions that were not carried out: epoch, operation, reason."""
    undone: int
    """Seeds that failed after blending began, so that the network went back."""
    undone_epochs: int
    """Epochs that those took, which are training cost too."""
    seconds: float
    model: MorphModel = field(repr=False)

    def as_audited(self) -> tuple[float, dict[str, int], list[float]]:
        """What the audited `run_heuristic_episode` returned: accuracy in percent, action counts,
        rewards."""
        return 100.0 * self.accuracy, self.action_counts, list(self.rewards)


def episode_configs(config: RunConfig) -> list[RunConfig]:
    """The config of each episode."""
    return [
        replace(config, seed=config.seed + SEED_STEP * i, episodes=1)
        for i in range(config.episodes)
    ]


def prepare(
    config: RunConfig,
    mode: str,
    *,
    task: Task | None = None,
    policy: Policy | None = None,
    hub: TelemetryHub | None = None,
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """What a "heuristic" or "fit" run owns; the latter has no controller. `ValueError` for what
    could not work."""
    require_known("mode", mode, ("heuristic", "fit"))
    growing = mode == "heuristic"
    if policy is not None and not growing:
        raise ValueError(
            "a policy decides about seeds, and a `fit` run has none; leave it out, or use "
            "`heuristic`"
        )
    if growing and not config.slots:
        raise ValueError(
            "no slots: name at least one of early, mid, late, or use `fit` to train without growth"
        )
    episode = build_episode(
        config, task=task, slots=config.slots if growing else (), registry=registry
    )
    episode.mode = mode
    episode.hub = hub or TelemetryHub()
    if growing:
        names = episode.model.registry.names(episode.model.host.topology)
        episode.policy = policy or HeuristicTamiyo(config.policy, config.growth, names)
    return episode


def run_episode(episode: Episode, checkpoints: Checkpoints | None = None) -> EpisodeResult:
    """Run every epoch in the one order there is: train, evaluate, track, slots step, decide,
    execute.

    An episode restored from a checkpoint goes on with the epoch after it. One that the governor
    finds gone bad is, by policy, reported, the last, or undone: then nothing is tracked or decided.
    However the run ends, its network is the one that `config.keep` names, and its last event is
    RUN_FINISHED with the status "completed", "interrupted", "nonfinite", "diverged" or "failed";
    what ended it is raised again.
    """
    config = episode.config
    hub = episode.hub
    started = time.perf_counter() - episode.seconds
    if episode.epoch == 0:
        episode.policy.reset()
        hub.emit(run_started(episode))
    for event in inexact_resumes(episode):
        hub.emit(event)
    ending = Ending(status="failed", epoch=episode.epoch)
    try:
        with episode.random.active():
            keep_good(episode, episode.epoch)
            for number in range(episode.epoch + 1, config.max_epochs + 1):
                ending.epoch = number
                epoch = Epoch(episode, number)
                signals = epoch.observe()
                if signals is not None:
                    epoch.apply(episode.policy.decide(signals))
                episode.epoch = number
                episode.seconds = time.perf_counter() - started
                if checkpoints is not None:
                    checkpoints.take(episode)
            _give_kept(episode)
            ending.test = evaluate(
                episode.model,
                map(episode.stop.before, episode.test),
                config.train,
                task_type=episode.task.task_type,
                step=episode.step,
            )
            ending.status = "completed"
    except BaseException as error:
        ending.blame(error)
        raise
    finally:
        _give_kept(episode)
        ending.seconds = time.perf_counter() - started
        hub.emit(run_finished(episode, ending))
        if checkpoints is not None:
            checkpoints.write()
    assert ending.test is not None
    return _result(episode, ending.test, ending.seconds)


def _result(episode: Episode, test: EvalResult, seconds: float) -> EpisodeResult:
    return EpisodeResult(
        accuracy=episode.accuracy / 100.0,
        kept_epoch=kept_epoch(episode),
        test=test,
        parameters=sum(p.numel() for p in episode.model.parameters()),
        fossils=episode.model.fossils,
        contributions=tuple(episode.contributions),
        action_counts=action_counts(episode),
        rewards=tuple(reward for _, reward in episode.decided),
        refused=tuple(episode.refused),
        undone=episode.trial.undone,
        undone_epochs=episode.trial.epochs,
        seconds=seconds,
        model=episode.model,
    )


@dataclass(kw_only=True)
class Ending:
    """How a run ended."""

    status: str
    epoch: int
    error: str | None = None
    test: EvalResult | None = None
    seconds: float = 0.0

    def blame(self, error: BaseException) -> None:
        """What ended the run before its time."""
        self.status = "failed"
        if isinstance(error, KeyboardInterrupt):
            self.status = "interrupted"
        elif isinstance(error, NonFiniteLossError):
            self.status = "nonfinite"
        elif isinstance(error, BadNumbersError):
            self.status = "diverged"
        self.error = str(error) if isinstance(error, Exception) else None


def _give_kept(episode: Episode) -> None:
    """Make the episode's network the one that the run gives."""
    if episode.config.keep == "best":
        episode.kept.give(episode.model)
        del episode.contributions[episode.model.fossils :]  # of seeds that came later


def kept_epoch(episode: Episode) -> int:
    """The epoch whose network the run gives."""
    best = episode.config.keep == "best" and episode.kept.epoch > 0
    return episode.kept.epoch if best else episode.epoch


def action_counts(episode: Episode) -> dict[str, int]:
    """How often each operation was decided."""
    return {op.name: sum(name == op.name for name, _ in episode.decided) for op in Op}


def run_finished(episode: Episode, ending: Ending) -> Event:
    """The last event of a run."""
    model = episode.model
    data = {
        "status": ending.status,
        "error": ending.error,
        "test": None if ending.test is None else plain(ending.test),
        "accuracy": episode.accuracy,
        "keep": episode.config.keep,
        "kept_epoch": kept_epoch(episode),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fossils": model.fossils,
        "contributions": tuple(episode.contributions),
        "action_counts": action_counts(episode),
        "rewards": tuple(reward for _, reward in episode.decided),
        "refused": tuple(episode.refused),
        "undone": episode.trial.undone,
        "undone_epochs": episode.trial.epochs,
        "seconds": ending.seconds,
    }
    return Event(EventType.RUN_FINISHED, ending.epoch, data)


def inexact_resumes(episode: Episode) -> list[Event]:
    """A warning for each split whose loader cannot promise the same batches to a resumed run: at
    the start of a run, and where it is resumed."""
    advice = "give it state_dict and load_state_dict, or return the data set itself"
    found = []
    for split, reason in episode.sources.inexact().items():
        words = f"a resumed run may get other {split} batches than this one"
        if episode.epoch:
            words = f"resumed, perhaps with other {split} batches than an unbroken run has"
        data = {"split": split, "message": f"{words}: {reason}; {advice}"}
        found.append(Event(EventType.INEXACT_RESUME, episode.epoch, data))
    return found


def run_started(episode: Episode) -> Event:
    """The first event of a run."""
    config = episode.config
    model = episode.model
    data = {
        "mode": episode.mode,
        "task": episode.task.name,
        "seed": config.seed,
        "max_epochs": config.max_epochs,
        "device": str(episode.device),
        "backend": episode.step.backend(episode.device),
        "slots": [slot.state.slot for slot in model.slots],
        "data": dict(episode.data_record),
        "host_parameters": sum(p.numel() for p in model.get_host_parameters()),
    }
    return Event(EventType.RUN_STARTED, 0, data)
