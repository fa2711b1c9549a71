"""Runs of two processes that divide the parameters of one network among them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from esper_train import (
    DistributedConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Task,
    run_fit,
    run_heuristic_episode,
)
from tests.helpers.ranks import (
    DDP,
    FIT,
    FITS,
    fit_of,
    stop_rank_1,
    tables,
    texts,
    whole_weights,
    with_criterion,
)

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


def refusals(rank: int, directory: Path) -> list[str]:
    """The errors of a run that grows, and of one with a criterion of one's own."""
    config = replace(CONFIG, distributed=FSDP2)
    found = []
    for run, task in (
        (run_heuristic_episode, tables()),
        (run_fit, with_criterion("own", 33)),
    ):
        try:
            run(config, task=task)
        except ValueError as error:
            found.append(str(error))
    return found


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    **{name: partial(fit_of, *case, distributed=FSDP2) for name, case in SHARDED_FITS.items()},
    "turns": fit_in_turn,
    "stopped": partial(stop_rank_1, distributed=FSDP2),
    "refused": refusals,
}


def all_scenarios(rank: int, directory: Path) -> dict[str, Any]:
    """Every scenario in turn, since starting processes takes longer than each of them."""
    return {name: scenario(rank, directory) for name, scenario in SCENARIOS.items()}
