"""Runs of two processes that divide the parameters of one network among them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_train import (
    Blueprint,
    BlueprintRegistry,
    DistributedConfig,
    Host,
    HostConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Task,
    run_fit,
    run_heuristic_episode,
)
from esper_train.base.stop import Stopped
from tests.helpers import ranks
from tests.helpers.ranks import (
    DDP,
    FIT,
    FITS,
    SignalledAt,
    counted_collectives,
    double_perceptron,
    fit_of,
    grow_in,
    life_of,
    stop_rank_1,
    tables,
    texts,
    whole_weights,
    with_criterion,
)
from tests.helpers.scripted import Script, germinate

FSDP2 = replace(DDP, strategy="fsdp2")
CONFIG = replace(FIT, train=replace(FIT.train, on_bad_numbers="stop"))
SHARDED_FITS: dict[str, tuple[Callable[[], Task], RunConfig]] = {
    **{
        name: (make, replace(config, train=replace(config.train, on_bad_numbers="stop")))
        for name, (make, config) in FITS.items()
        if name != "criterion of one's own"
    },
    "best network": (tables, replace(CONFIG, keep="best")),
    "AdamW, a schedule, bad steps skipped": (
        partial(tables, 33, 7),
        replace(
            CONFIG,
            optim=OptimConfig(kind="adamw", schedule=ScheduleConfig(kind="cosine")),
            train=replace(CONFIG.train, on_bad_numbers="skip"),
        ),
    ),
}


def fit_in_turn(rank: int, directory: Path) -> dict[str, Tensor]:
    """The weights after an epoch each with FSDP2, in one process, with DDP, and with FSDP2."""
    turns = (FSDP2, DistributedConfig(), DDP, FSDP2)
    out = directory / "turns"
    for epoch, distributed in enumerate(turns, start=1):
        config = replace(CONFIG, max_epochs=epoch, distributed=distributed)
        if rank == 0 or distributed.strategy != "none":
            result = run_fit(config, task=texts(), out=out, resume=epoch > 1)
        dist.barrier()
    return whole_weights(result.model)


TURNS = {2: FSDP2, 3: DistributedConfig(), 14: FSDP2, 16: DDP, 22: FSDP2}
"""The last epoch of each part of a life. At the end of epoch 2 two seeds learn beside the network,
and at that of 14 and 16 one blends in."""


def grow_in_turn(rank: int, directory: Path) -> dict[str, Tensor]:
    """The weights after a life of seeds whose parts ran with different strategies."""
    for epochs, distributed in TURNS.items():
        config = replace(ranks.CONFIG, max_epochs=epochs, distributed=distributed)
        if rank == 0 or distributed.strategy != "none":
            weights = grow_in(directory / "grown", config, resume=epochs != min(TURNS))
        dist.barrier()
    return weights


STOPS = {"learning": (8, 1), "blending": (28, 5)}
"""What a seed does, to the step before which SIGTERM comes to rank 1, and the last whole epoch."""


def stop_growing(rank: int, directory: Path) -> dict[str, Any]:
    """The signal and the steps of runs that were stopped while a seed learned, and blended in."""
    found = {}
    for name, (step, _) in STOPS.items():
        signalled = SignalledAt(step if rank == 1 else 0)
        try:
            run_heuristic_episode(
                replace(ranks.CONFIG, distributed=FSDP2),
                task=replace(tables(), augment=signalled),
                policy=Script(e1=germinate("early", "bottleneck")),
                out=directory / name,
                baseline=False,
            )
        except Stopped as stopped:
            found[name] = {"signal": int(stopped.args[0]), "steps": signalled.steps}
    return found


class Scale(nn.Module):
    """A seed of one number, which has no dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Reading(nn.Module):
    """A module that needs values, not only shapes."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() >= 0 else x.clone()


def reading_perceptron(config: HostConfig) -> Host:
    host = double_perceptron(config)
    host.head = nn.Sequential(Reading(), host.head)
    return host


def refusals(rank: int, directory: Path) -> list[str]:
    """The errors of runs with a criterion of one's own, with seeds that cannot be divided, and with
    a host that needs values."""
    config = replace(CONFIG, distributed=FSDP2)
    scale = BlueprintRegistry([Blueprint("scale", "features", Scale)])
    reading = replace(tables(), build_host=reading_perceptron)
    runs: list[Callable[[], Any]] = [
        partial(run_fit, config, task=with_criterion("own", 33)),
        partial(run_heuristic_episode, config, task=tables(), registry=scale),
        partial(run_heuristic_episode, config, task=reading),
    ]
    found = []
    for run in runs:
        try:
            run()
        except ValueError as error:
            found.append(str(error))
    return found


SHARDED_LIVES: dict[str, tuple[Callable[[], Task], str, str]] = {
    "perceptron": (partial(tables, 33, 61), "bottleneck", "linear"),
    "perceptron, gated": (tables, "norm", "gated"),
    "transformer": (texts, "lora", "linear"),
}
SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    **{name: partial(fit_of, *case, distributed=FSDP2) for name, case in SHARDED_FITS.items()},
    "turns": fit_in_turn,
    "stopped": partial(stop_rank_1, distributed=FSDP2),
    **{
        name: partial(life_of, task, blueprint, distributed=FSDP2, blend=blend)
        for name, (task, blueprint, blend) in SHARDED_LIVES.items()
    },
    "grown": grow_in_turn,
    "stopped growing": stop_growing,
    "refused": refusals,
    "counted": partial(counted_collectives, distributed=FSDP2),
}


def all_scenarios(rank: int, directory: Path) -> dict[str, Any]:
    """Every scenario in turn, since starting processes takes longer than each of them."""
    return {name: scenario(rank, directory) for name, scenario in SCENARIOS.items()}
