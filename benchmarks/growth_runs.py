"""The runs that `growth` compares, for a task, a seed and a number of epochs: a grown network, its
host, and a static network that has the grown one's seeds from the start.

Training cost is counted in epochs of the host: multiply-adds of forward and backward passes, seeds
that were undone and passes of seeds that learn included, evaluation excluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks import tabular
from esper_train import EpisodeResult, Event, EventType, RunConfig, Task, TelemetryHub
from esper_train.config import preset
from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.run.cost import multiply_adds
from esper_train.run.episode import Episode
from esper_train.run.run import PolicyMaker, prepare, run_episode
from esper_train.tasks import TASKS, get_task, registry_of
from esper_train.train.optimizers import make_optimizer

OWN = {tabular.TASK.name: tabular.TASK}
"""Tasks of the benchmarks, beside those of the package."""
NAMES = (*TASKS, *OWN)
POINTS = 20
"""Of a curve."""


@dataclass
class Watch:
    """A sink that keeps a number of each epoch of one run, and when blending began."""

    episode: Episode | None = None
    accuracies: list[float] = field(default_factory=list)
    """On the validation split, in percent."""
    costs: list[float] = field(default_factory=list)
    """Spent until then."""
    kept: list[int] = field(default_factory=list)
    """The epoch whose network the run would have given before this epoch; 0 for none."""
    blended: list[int] = field(default_factory=list)
    evaluations: int = 0
    """Passes over the validation split."""

    def write(self, event: Event) -> None:
        if event.type is EventType.EPOCH:
            self.accuracies.append(event.data["validation"]["accuracy"])
            self.evaluations += event.data["passes"]
            if self.episode is not None:
                self.costs.append(self.episode.cost.epochs)
                self.kept.append(self.episode.kept.epoch)
        elif event.type is EventType.SEED_STAGE and event.data["stage"] == "BLENDING":
            self.blended.append(event.epoch)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    result: EpisodeResult
    watch: Watch
    step: int
    """Multiply-adds of a training step of the network that the run gave, for a full batch."""

    def curve(self, end: float, unit: float = 1.0) -> list[float]:
        """Validation accuracy, in percent, of the network that the run would give, by how much it
        may cost: after each of `POINTS` equal parts of `end`. `unit` is the cost of this network's
        epoch."""
        watch = self.watch
        kept = [*watch.kept[1:], self.result.kept_epoch]
        given = [watch.accuracies[(best or epoch) - 1] for epoch, best in enumerate(kept, start=1)]
        return stepped([unit * cost for cost in watch.costs], given, end)


def stepped(costs: Sequence[float], values: Sequence[float], end: float) -> list[float]:
    """The value at the last of the rising `costs` that is not above each of `POINTS` equal parts of
    `end`; before the first cost, the first value."""
    found = []
    for number in range(1, POINTS + 1):
        most = end * number / POINTS * (1 + 1e-9)  # what costs exactly that is not above it
        known = [value for cost, value in zip(costs, values, strict=True) if cost <= most]
        found.append(round((known or values)[-1 if known else 0], 3))
    return found


def longest_harm(
    accuracies: Sequence[float], blended: Sequence[int], *, window: int, points: float
) -> int:
    """The largest number of consecutive epochs in which accuracy was more than `points` below its
    mean of the `window` epochs before blending began.

    `accuracies` has one of each epoch, and `blended` the epochs after which blending began.
    """
    longest = 0
    for began in blended:
        least = fmean(accuracies[max(0, began - window) : began]) - points
        lasted = 0
        for accuracy in accuracies[began:]:
            lasted = lasted + 1 if accuracy < least else 0
            longest = max(longest, lasted)
    return longest


def task_named(name: str, config: RunConfig) -> Task:
    """A task of the package, or one of the benchmarks."""
    return OWN[name] if name in OWN else get_task(name, config.task_config())


def config_of(name: str) -> RunConfig:
    """The settings that runs of the task start from."""
    return preset(name) if name in TASKS else RunConfig()


def run(config: RunConfig, task: Task, mode: str, policy: PolicyMaker | None = None) -> Run:
    """Train a network; `mode` is "heuristic" or "fit"."""
    watch = Watch()
    episode = prepare(config, mode, task=task, policy=policy, hub=TelemetryHub([watch]))
    watch.episode = episode
    result = run_episode(episode)
    return Run(result=result, watch=watch, step=multiply_adds(result.model, episode.example))


def seeds_of(result: EpisodeResult) -> dict[str, str]:
    """The blueprint of the seed in each slot that has one."""
    states = [slot.state for slot in result.model.slots]
    return {state.slot: state.blueprint for state in states if state.blueprint is not None}


def static_task(task: Task, config: RunConfig, seeds: Mapping[str, str]) -> Task:
    """The task whose host has these seeds from the start, as ordinary layers.

    The host starts from the same numbers as without them. Each part has the learning rate that it
    has in the grown network.
    """
    registry = registry_of(task)
    parts: list[nn.Module] = []

    def build(host_config: HostConfig) -> Host:
        host = task.build_host(host_config)
        parts.clear()
        for slot, blueprint in seeds.items():
            seed = registry.require(host.topology, blueprint).build(host.slot_channels[slot])
            host.segments[slot] = nn.Sequential(host.segments[slot], seed)
            parts.append(seed)
        return host

    def optimizer(parameters: Sequence[nn.Parameter], lr: float, group: str) -> Optimizer:
        grown = {id(p) for part in parts for p in part.parameters()}
        made = make_optimizer([p for p in parameters if id(p) not in grown], lr, config.optim)
        seeds_own = [p for p in parameters if id(p) in grown]
        if seeds_own:
            made.add_param_group({"params": seeds_own, "lr": config.optim.seed_lr})
        return made

    return replace(task, build_host=build, make_optimizer=optimizer)


def compare(name: str, config: RunConfig) -> dict[str, Any]:
    """Train a grown network, and its host and the static network of its final size: for as many
    epochs, and for as many as cost what the grown run cost."""
    task = task_named(name, config)
    train = partial(run, mode="fit")
    grown = run(config, task, "heuristic")
    host = train(config, task)
    cost = grown.result.cost
    seeds = seeds_of(grown.result)
    same = static_task(task, config, seeds)
    static = train(config, same) if seeds else host
    unit = static.step / host.step
    host_equal = train(replace(config, max_epochs=round(cost)), task)
    epochs = max(1, round(cost / unit))
    static_equal = train(replace(config, max_epochs=epochs), same) if seeds else host_equal
    harm, harm_host = (
        longest_harm(
            each.watch.accuracies,
            grown.watch.blended,
            window=config.growth.window,
            points=config.growth.harm,
        )
        for each in (grown, host)
    )
    return {
        "epochs": config.max_epochs,
        "seed": config.seed,
        "grown": grown.result.test.points,
        "host": host.result.test.points,
        "static": static.result.test.points,
        "host_equal": host_equal.result.test.points,
        "static_equal": static_equal.result.test.points,
        "parameters": grown.result.parameters,
        "host_parameters": host.result.parameters,
        "cost": cost,
        "unit": unit,
        "step": host.step,
        "evaluations": grown.watch.evaluations,
        "fossils": grown.result.fossils,
        "undone": grown.result.undone,
        "undone_epochs": grown.result.undone_epochs,
        "harm": harm,
        "harm_host": harm_host,
        "curves": {
            "grown": grown.curve(cost),
            "host": host_equal.curve(cost),
            "static": static_equal.curve(cost, unit),
        },
    }
