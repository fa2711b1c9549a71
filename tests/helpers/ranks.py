"""Several processes that train together, for tests: they meet through a file, and leave what they
found in files."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp

from esper_train import (
    Decision,
    DistributedConfig,
    EventType,
    GovernorConfig,
    GradConfig,
    HostConfig,
    Op,
    OptimConfig,
    RunConfig,
    Splits,
    Task,
    TelemetryHub,
    TrainConfig,
    run_heuristic_episode,
)
from esper_train.base.state import copied
from esper_train.morph.host import Host
from esper_train.morph.transformer import transformer_host
from tests.helpers.own import perceptron, table_data
from tests.helpers.scripted import EASY, Recorder, Script, germinate

SECONDS = 120.0
"""How long a test waits for its processes."""
DDP = DistributedConfig(strategy="ddp", timeout=60.0)


def together(world: int, work: Callable[[int, Path], Any], directory: Path) -> list[Any]:
    """What `work(rank, directory)` returned in each of `world` processes, one group of gloo."""
    context = mp.start_processes(
        _one, (world, work, directory), nprocs=world, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"the ranks still run after {SECONDS} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(directory / f"{rank}.pt") for rank in range(world)]


def _one(rank: int, world: int, work: Callable[[int, Path], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(work(rank, directory), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


class PlantedNan:
    """An augmentation that makes the inputs of one step not a number; steps count from 1."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.steps = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        return (inputs * float("nan") if self.steps == self.step else inputs), targets


def double_perceptron(config: HostConfig) -> Host:
    return perceptron(config).double()


def double_transformer(config: HostConfig) -> Host:
    return transformer_host(vocab_size=7, context=5, width=8, depth=3).double()


def table_splits(rows: int) -> Splits:
    inputs, targets = table_data(rows + 64)
    inputs = inputs.double()
    train, validation, test = zip(
        inputs.split([rows, 32, 32]), targets.split([rows, 32, 32]), strict=True
    )
    return Splits(train=train, validation=validation, test=test)


def text_splits() -> Splits:
    """Sequences of tokens; many targets are ignored, all of them in whole sequences."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (61, 6), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[::3] = -100
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    parts = zip(inputs.split([29, 16, 16]), targets.split([29, 16, 16]), strict=True)
    train, validation, test = parts
    return Splits(train=train, validation=validation, test=test)


def tables(rows: int = 33, nan_at: int = 0) -> Task:
    """A perceptron in float64."""
    return Task(
        name="double-table",
        task_type="classification",
        num_classes=3,
        load=partial(table_splits, rows),
        build_host=double_perceptron,
        augment=PlantedNan(nan_at),
    )


def texts() -> Task:
    """A transformer in float64."""
    return Task(
        name="double-text",
        task_type="lm",
        num_classes=7,
        load=text_splits,
        build_host=double_transformer,
    )


CONFIG = RunConfig(
    max_epochs=22,
    batch_size=8,
    slots=("early", "mid"),
    keep="last",
    growth=replace(EASY, blending_epochs=2),
    optim=OptimConfig(host_lr=0.05, seed_lr=0.05),
    train=TrainConfig(on_bad_numbers="rollback", grad=GradConfig(clip_norm=0.5)),
    governor=GovernorConfig(snapshot_epochs=1),
)


def life(blueprint: str, blend: str = "linear") -> Script:
    """Germinations, a blend, a fossilization, a cull in training, and one during a blend, which is
    undone."""
    return Script(
        e1=germinate("early", blueprint, blend),
        e2=germinate("mid", blueprint),
        e3=Decision(op=Op.CULL, slot="mid", reason="script"),
        e11=Decision(op=Op.FOSSILIZE, slot="early", reason="script"),
        e12=germinate("mid", blueprint),
        e17=Decision(op=Op.CULL, slot="mid", reason="script"),
    )


def result_of(task: Task, config: RunConfig, script: Script) -> dict[str, Any]:
    """A run as plain values and tensors: its network, its events, what each epoch measured."""
    recorder = Recorder()
    result = run_heuristic_episode(config, task=task, policy=script, hub=TelemetryHub([recorder]))
    epochs = recorder.of(EventType.EPOCH)
    return {
        "weights": copied(result.model.state_dict()),
        "stages": recorder.stages(),
        "kinds": [(e.epoch, e.type.name) for e in recorder.events],
        "train": [e.data["train"] for e in epochs],
        "validation": [e.data["validation"] for e in epochs],
        "norms": [e.data["grad"]["gradient_norm"] for e in epochs],
        "refused": [list(map(str, each)) for each in result.refused],
        "test": asdict(result.test)["loss"],
        "decisions": len(script.seen),
    }


def life_of(task: Callable[[], Task], blueprint: str, rank: int, directory: Path) -> dict[str, Any]:
    return result_of(task(), replace(CONFIG, distributed=DDP), life(blueprint))
