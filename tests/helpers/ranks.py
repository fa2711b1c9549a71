"""Several processes that train together, for tests: they meet through a file, and leave what they
found in files.

Long file: the tasks, runs and comparisons of each strategy share these settings.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.distributed.tensor import DTensor

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
    run_fit,
    run_heuristic_episode,
)
from esper_train.base.stop import Stopped
from esper_train.morph.host import Host
from esper_train.morph.transformer import transformer_host
from esper_train.train.errors import RanksDifferError
from tests.helpers.own import perceptron, table_data
from tests.helpers.scripted import EASY, Recorder, Script, germinate

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "broadcast_object_list",
    "all_gather_single",
    "reduce_scatter_single",
)
"""The last two are new in torch 2.13."""
SECONDS = 400.0
"""How long a test waits for its processes."""
DDP = DistributedConfig(strategy="ddp", timeout=60.0)


def together(world: int, work: Callable[[int, Path], Any], directory: Path) -> list[Any]:
    """The return values of `work(rank, directory)` in `world` processes, which form one gloo
    group."""
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
    os._exit(0)  # FSDP2 keeps gloo's threads, which may abort a process while Python shuts down


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
        "weights": whole_weights(result.model),
        "stages": recorder.stages(),
        "kinds": [(e.epoch, e.type.name) for e in recorder.events],
        "train": [e.data["train"] for e in epochs],
        "validation": [e.data["validation"] for e in epochs],
        "norms": [e.data["grad"]["gradient_norm"] for e in epochs],
        "refused": [list(map(str, each)) for each in result.refused],
        "test": asdict(result.test)["loss"],
        "decisions": len(script.seen),
    }


def life_of(
    task: Callable[[], Task],
    blueprint: str,
    rank: int,
    directory: Path,
    distributed: DistributedConfig = DDP,
    blend: str = "linear",
) -> dict[str, Any]:
    config = replace(CONFIG, distributed=distributed)
    return result_of(task(), config, life(blueprint, blend))


def fit_of(
    make: Callable[[], Task],
    config: RunConfig,
    rank: int,
    directory: Path,
    distributed: DistributedConfig = DDP,
) -> Any:
    """Weights, and the epochs' measures, of plain training."""
    return fitted(make(), replace(config, distributed=distributed))


def fitted(task: Task, config: RunConfig) -> dict[str, Any]:
    recorder = Recorder()
    result = run_fit(config, task=task, hub=TelemetryHub([recorder]))
    epochs = recorder.of(EventType.EPOCH)
    return {
        "weights": whole_weights(result.model),
        "train": [e.data["train"] for e in epochs],
        "norms": [e.data["grad"]["gradient_norm"] for e in epochs],
    }


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights; those that are divided among the ranks are gathered."""
    state = model.state_dict().items()
    return {n: x.full_tensor() if isinstance(x, DTensor) else x.clone() for n, x in state}


def continue_each_other(rank: int, directory: Path) -> dict[str, Any]:
    """The weights after two epochs of both processes, two of the first alone, and two of both."""
    config = replace(CONFIG, max_epochs=2, distributed=DDP)
    grow_in(directory / "grown", config)
    if rank == 0:
        alone = replace(config, max_epochs=4, distributed=DistributedConfig())
        grow_in(directory / "grown", alone, resume=True)
    dist.barrier()
    return grow_in(directory / "grown", replace(config, max_epochs=6), resume=True)


def grow_in(out: Path, config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """The weights after a run that leaves its directory."""
    result = run_heuristic_episode(
        config, task=texts(), policy=life("lora"), out=out, resume=resume, baseline=False
    )
    return whole_weights(result.model)


class SignalledAt:
    """An augmentation that sends SIGTERM to its own process before one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.steps = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        if self.steps == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs, targets


def stop_rank_1(rank: int, directory: Path, distributed: DistributedConfig = DDP) -> dict[str, Any]:
    """SIGTERM comes to rank 1, before its 8th step."""
    signalled = SignalledAt(8 if rank == 1 else 0)
    task = replace(tables(), augment=signalled)
    config = replace(CONFIG, train=TrainConfig(), distributed=distributed)
    try:
        run_fit(config, task=task, out=directory / "stopped")
    except Stopped as stopped:
        return {"signal": int(stopped.args[0]), "steps": signalled.steps}
    return {}


def drift(rank: int, directory: Path) -> str:
    """The second epoch changes a weight on rank 1 alone; the error of the run."""
    hosts: list[Host] = []

    def build(config: HostConfig) -> Host:
        hosts.append(double_perceptron(config))
        return hosts[0]

    def changing(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if rank == 1 and hosts[0].training:
            with torch.no_grad():
                hosts[0].head.bias[0] += 1e-12
        return inputs, targets

    task = replace(tables(), build_host=build, augment=changing)
    try:
        run_fit(replace(CONFIG, distributed=DDP), task=task)
    except RanksDifferError as error:
        return str(error)
    return "none"


def counted_collectives(
    rank: int, directory: Path, distributed: DistributedConfig = DDP
) -> dict[str, int]:
    """Calls of torch's collectives in a growing run of 6 epochs of 5 steps."""
    script = Script(e2=germinate("early", "bottleneck"))
    config = replace(CONFIG, max_epochs=6, distributed=distributed, train=TrainConfig())
    with counting_collectives() as counts:
        run_heuristic_episode(config, task=tables(), policy=script)
    return dict(counts)


@contextmanager
def counting_collectives() -> Iterator[Counter[str]]:
    """Counts the calls of each of `COLLECTIVES` that this torch has."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                counting = _counting(name, getattr(dist, name), counts)
                stack.enter_context(mock.patch.object(dist, name, counting))
        yield counts


def _counting(name: str, function: Callable[..., Any], counts: Counter[str]) -> Any:
    def call(*args: Any, **named: Any) -> Any:
        counts[name] += 1
        return function(*args, **named)

    return call


FIT = replace(CONFIG, max_epochs=3)
CRITERIA: dict[str, Any] = {
    "weighted": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "own": nn.MultiMarginLoss(),
}


def with_criterion(name: str, rows: int) -> Task:
    return replace(tables(rows), criterion=CRITERIA[name])


FITS: dict[str, tuple[Callable[[], Task], RunConfig]] = {
    # 33 rows in batches of 8 leave one row: rank 1 gets none of it
    "class weights": (partial(with_criterion, "weighted", 33), FIT),
    "criterion of one's own": (
        partial(with_criterion, "own", 33),
        replace(FIT, train=replace(FIT.train, on_bad_numbers="stop")),
    ),
    "sum": (partial(with_criterion, "sum", 29), FIT),
    "shares whose targets are all ignored, accumulated": (
        texts,
        replace(FIT, batch_size=2, train=TrainConfig(accumulate=3)),
    ),
}
LIVES: dict[str, tuple[Callable[[], Task], str]] = {
    "perceptron": (partial(tables, 33, 61), "bottleneck"),
    "transformer": (texts, "lora"),
}
SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    **{name: partial(fit_of, *case) for name, case in FITS.items()},
    **{name: partial(life_of, *case) for name, case in LIVES.items()},
    "continued": continue_each_other,
    "stopped": stop_rank_1,
    "drifted": drift,
    "counted": counted_collectives,
}


def all_scenarios(rank: int, directory: Path) -> dict[str, Any]:
    """Every scenario in turn, since starting processes takes longer than each of them."""
    return {name: scenario(rank, directory) for name, scenario in SCENARIOS.items()}
