"""Processes that meet as torchrun's do, in a store that outlives them, and what becomes of the
others when one fails, is killed or stops answering."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp

from esper_train import DistributedConfig, RunConfig, run_fit, run_heuristic_episode
from esper_train.train.errors import RankLostError
from tests.helpers.ranks import SECONDS, tables
from tests.helpers.scripted import Script, germinate

STEP = 12
"""The step before which something happens to rank 1; there are five per epoch."""
CONFIG = RunConfig(
    max_epochs=4,
    batch_size=8,
    seed=5,
    keep="last",
    distributed=DistributedConfig(strategy="ddp", timeout=20.0),
)


GROWING = replace(
    CONFIG,
    slots=("early", "mid"),
    keep="best",
    distributed=replace(CONFIG.distributed, strategy="fsdp2"),
)
"""What rank 0 does in the end, alone: seat the seed of the best network again."""


class Sabotage:
    """An augmentation that does something before one step, on rank 1 alone."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._steps = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self._steps += 1
        if self._steps == STEP and os.environ["RANK"] == "1":
            self._act()
        return inputs, targets


def fail() -> None:
    raise ValueError("a file of this rank is damaged")


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run(
    out: Path, act: Callable[[], object], *, resume: bool = False, grows: bool = False
) -> dict[str, Any]:
    """The error that ended a run, or the network's weights."""
    task = replace(tables(33), augment=Sabotage(act))
    try:
        if grows:
            script = Script(e1=germinate("early", "bottleneck"))
            result = run_heuristic_episode(GROWING, task=task, policy=script, out=out)
        else:
            result = run_fit(CONFIG, task=task, out=out, resume=resume)
    except (RankLostError, ValueError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"weights": dict(result.model.state_dict())}


def fail_growing(directory: Path) -> dict[str, Any]:
    """Rank 1 raises. No run comes after this one, whose report keeps rank 0 for a while."""
    return {"failed growing": run(directory / "failed growing", fail, grows=True)}


def fail_and_be_killed(directory: Path) -> dict[str, Any]:
    """Rank 1 raises in the first run and is killed in the second."""
    return {
        "failed": run(directory / "failed", fail),
        "killed": run(directory / "killed", send(signal.SIGKILL)),
    }


def resume_and_be_stopped(directory: Path) -> dict[str, Any]:
    """The run of the killed rank goes on, and in another rank 1 stops answering."""
    return {
        "resumed": run(directory / "killed", lambda: None, resume=True),
        "stopped": run(directory / "stopped", send(signal.SIGSTOP)),
    }


def survivors(
    store: dist.TCPStore, work: Callable[[Path], dict[str, Any]], directory: Path
) -> dict[str, Any]:
    """The findings of rank 0 of two."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_one, args=(rank, store.port, work, directory)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        processes[0].join(SECONDS)
        assert processes[0].exitcode == 0, "rank 0 failed, or is still there"
    finally:
        for process in processes:
            process.kill()
            process.join()
    found: dict[str, Any] = torch.load(directory / f"{work.__name__}.pt")
    return found


def _one(rank: int, port: int, work: Callable[[Path], dict[str, Any]], directory: Path) -> None:
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    found = work(directory)
    if rank == 0:
        torch.save(found, directory / f"{work.__name__}.pt")
    os._exit(0)  # FSDP2 keeps gloo's threads, which may abort a process while Python shuts down
