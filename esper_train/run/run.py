"""A run from first to last epoch: builds what it owns, then trains, measures, decides and grows,
epoch by epoch.

`job` calls `prepare` and `run_episode` for a run with a directory, `start` for one without. Plain
training is the same run with no slots and a controller that never acts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from esper_train.base.names import require_known
from esper_train.config import SEED_STEP, RunConfig
from esper_train.control.governor import Finding
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Op, Policy, checked_policy
from esper_train.control.signals import Signals
from esper_train.morph.blueprints import BlueprintRegistry
from esper_train.morph.model import MorphModel
from esper_train.run.build import build_episode
from esper_train.run.checkpoint import Taker
from esper_train.run.episode import Episode
from esper_train.run.epoch import Epoch, keep_good
from esper_train.run.measure import Measured
from esper_train.run.records import plain
from esper_train.tasks import Task
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.train.errors import BadNumbersError, NonFiniteLossError
from esper_train.train.launched import Launched
from esper_train.train.loop import launch_evaluation
from esper_train.train.results import EvalResult, Measures

PolicyMaker = Callable[[MorphModel], Policy]


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """The result of a run."""

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
    """Epochs from the beginning of their blending to their end, which count as training cost."""
    cost: float
    """Multiply-adds of training, in epochs of the host without a seed."""
    seconds: float
    model: MorphModel = field(repr=False)

    def as_audited(self) -> tuple[float, dict[str, int], list[float]]:
        """The return value of the audited `run_heuristic_episode`: accuracy in percent, action
        counts, rewards."""
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
    policy: Policy | PolicyMaker | None = None,
    hub: TelemetryHub | None = None,
    registry: BlueprintRegistry | None = None,
) -> Episode:
    """The objects that a "heuristic" or "fit" run owns; the latter has no controller.

    `policy` may be a function that makes the controller for the network, and refuses those that it
    cannot control. `ValueError` for what could not work.
    """
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
        policy = HeuristicTamiyo(config.policy, config.growth, names) if policy is None else policy
        episode.policy = checked_policy(policy(episode.model) if callable(policy) else policy)
    return episode


def run_episode(episode: Episode, checkpoints: Taker | None = None) -> EpisodeResult:
    """Run every epoch under the episode's policy.

    An episode restored from a checkpoint goes on with the epoch after it.
    """
    with EpisodeRun(episode, checkpoints) as run, episode.random.active():
        while not run.over:
            signals = run.observe(episode.agreed(run.launch().read()))
            if signals is not None:
                run.apply(episode.decide(signals))
        return run.finish(episode.agreed(run.launch_test().read()))


class EpisodeRun:
    """A run one decision at a time, in the one order there is: train, evaluate, track, slots step,
    decide, execute. Whoever decides drives it: `run_episode`, or an environment of `rl`.

    Until `over`, `launch` queues an epoch on the device, `observe` takes what was read of it, and
    `apply` carries out the decision about it; then `launch_test` and `finish` do the same with the
    test split. Call all of them while `episode.random` is active; reading in between may be outside
    of it, so that the results of several runs can be read together. An epoch that the governor
    finds gone bad is, by policy, reported, the last, or undone: then nothing is tracked or decided.
    However the run ends, on leaving `with` its network is the one that `config.keep` names, and its
    last event is RUN_FINISHED with the status "completed", "interrupted", "nonfinite", "diverged"
    or "failed"; what ended it is raised again.
    """

    def __init__(self, episode: Episode, checkpoints: Taker | None = None) -> None:
        self._episode = episode
        self._checkpoints = checkpoints
        self._ending = Ending(status="failed", epoch=episode.epoch)
        self._epoch: Epoch | None = None

    def __enter__(self) -> Self:
        episode = self._episode
        self._started = time.perf_counter() - episode.seconds
        if episode.epoch == 0:
            episode.policy.reset()
            episode.hub.emit(run_started(episode))
        for event in inexact_resumes(episode):
            episode.hub.emit(event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ending = self._ending
        if error is not None:
            ending.blame(error)
        _give_kept(self._episode)
        ending.seconds = self._seconds()
        self._episode.hub.emit(run_finished(self._episode, ending))
        if self._checkpoints is not None:
            self._checkpoints.write()

    @property
    def over(self) -> bool:
        """Whether every epoch is done."""
        return self._episode.epoch >= self._episode.config.max_epochs

    @property
    def finding(self) -> Finding | None:
        """The governor's finding in the last observed epoch."""
        return None if self._epoch is None else self._epoch.finding

    def launch(self) -> Launched[Measured]:
        """Queue the next epoch: train and evaluate."""
        episode = self._episode
        if self._epoch is None:
            keep_good(episode, episode.epoch)
        self._ending.epoch = episode.epoch + 1
        self._epoch = Epoch(episode, episode.epoch + 1)
        return self._epoch.launch()

    def observe(self, measured: Measured) -> Signals | None:
        """Take the epoch to its decision; None where it was undone, without a decision."""
        assert self._epoch is not None
        signals = self._epoch.observe(measured)
        if signals is None:
            self._end_epoch()
        return signals

    def apply(self, decision: Decision) -> float:
        """Carry out the decision about the epoch just observed, and return its reward."""
        assert self._epoch is not None
        reward = self._epoch.apply(decision)
        self._end_epoch()
        return reward

    def launch_test(self) -> Launched[EvalResult]:
        """Queue the test split for the network that `config.keep` names."""
        episode = self._episode
        _give_kept(episode)
        return launch_evaluation(
            episode.model,
            episode.stoppable(episode.test),
            episode.config.train,
            step=episode.step,
        )

    def finish(self, test: EvalResult) -> EpisodeResult:
        """The result of the run, once all epochs and the test are done."""
        self._ending.test = test
        self._ending.status = "completed"
        return _result(self._episode, test, self._seconds())

    def _end_epoch(self) -> None:
        self._episode.epoch = self._ending.epoch
        self._episode.seconds = self._seconds()
        if self._checkpoints is not None:
            self._checkpoints.take(self._episode)

    def _seconds(self) -> float:
        return time.perf_counter() - self._started


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
        cost=episode.cost.epochs,
        seconds=seconds,
        model=episode.model,
    )


@dataclass(kw_only=True)
class Ending:
    """The outcome of a run."""

    status: str
    epoch: int
    error: str | None = None
    test: EvalResult | None = None
    seconds: float = 0.0

    def blame(self, error: BaseException) -> None:
        """The error that ended the run early."""
        self.status = "failed"
        if isinstance(error, KeyboardInterrupt):
            self.status = "interrupted"
        elif isinstance(error, NonFiniteLossError):
            self.status = "nonfinite"
        elif isinstance(error, BadNumbersError):
            self.status = "diverged"
        self.error = str(error) if isinstance(error, Exception) else None


def _give_kept(episode: Episode) -> None:
    """Make the episode's network the one that the run returns."""
    if episode.config.keep == "best":
        episode.kept.give(episode.model)
        del episode.contributions[episode.model.fossils :]  # of seeds that were added later


def kept_epoch(episode: Episode) -> int:
    """The epoch whose network the run returns."""
    best = episode.config.keep == "best" and episode.kept.epoch > 0
    return episode.kept.epoch if best else episode.epoch


def action_counts(episode: Episode) -> dict[str, int]:
    """The number of decisions for each operation."""
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
        "cost": episode.cost.epochs,
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
        "policy": type(episode.policy).__name__,
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
