"""The calls of CUDA that a capture makes, and what only a GPU can show."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from esper_train import EpochResult, GradConfig, TrainConfig, build_train_step, train_one_epoch
from esper_train.train.capture import Capture, CudaGraphs, Work
from tests.helpers.taped import (
    SETTINGS,
    adamw,
    assert_same,
    data,
    everything,
    measures,
    network,
    registry,
    sgd,
)


def test_the_calls_of_cuda_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins only note the calls. What CUDA makes of them, only a GPU can show."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: torch.device | str) -> None:
            self.name = "side" if isinstance(name, torch.device) else name
            self.device = torch.device("cuda")

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(what: str) -> Iterator[None]:
        calls.append(f"in {what}")
        try:
            yield
        finally:
            calls.append(f"out of {what}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(
        torch.cuda,
        "graph",
        lambda graph, *, stream, capture_error_mode: entered(
            f"{capture_error_mode} capture on {stream.name}"
        ),
    )
    graphs = CudaGraphs(torch.device("cuda"))
    graphs.run(lambda: calls.append("work"))
    assert calls == [
        "side waits for current",
        "in side",
        "work",
        "out of side",
        "current waits for side",
    ]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        graphs.run(lambda: calls.append(str(1 / 0)))
    assert calls == ["side waits for current", "in side", "out of side", "current waits for side"]
    calls.clear()
    replay = graphs.record(lambda: calls.append("work"))
    capture = "thread_local capture on side"
    assert calls == ["in side", f"in {capture}", "work", f"out of {capture}", "out of side"]
    replay()
    assert calls[-1] == "replay"


class EagerGraphs(CudaGraphs):
    """The same steps on the same stream, without a graph."""

    def record(self, work: Work) -> Work:
        return lambda: self.run(work)


def on_gpu(
    setting: str, make: Callable[..., Optimizer], graphs: type[CudaGraphs]
) -> tuple[Any, list[EpochResult]]:
    config = TrainConfig(capture=True, **SETTINGS[setting])
    model = network().cuda()
    step = build_train_step("classification", config)
    optimizers = registry(model, make)
    step.capture = Capture(graphs(next(model.parameters()).device))
    batches = data(*[8] * 13, 3)
    torch.cuda.manual_seed(0)
    results = [
        train_one_epoch(model, batches, optimizers, config, task_type="classification", step=step)
        for _ in range(2)
    ]
    return everything(model, optimizers) | {"random": torch.cuda.get_rng_state()}, results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ten_replays_of_a_graph_are_ten_eager_steps(
    setting: str, make: Callable[..., Optimizer]
) -> None:
    (state, results), (eager, expected) = (
        on_gpu(setting, make, graphs) for graphs in (CudaGraphs, EagerGraphs)
    )
    assert results[1].replayed == (6 if setting == "accumulated" else 13)
    assert_same(state, eager)
    assert repr([measures(r) for r in results]) == repr([measures(r) for r in expected])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_epoch_of_replays_syncs_once() -> None:
    config = TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0))
    model = network().cuda()
    step = build_train_step("classification", config)
    optimizer = sgd(*model.parameters())
    batches = [(inputs.cuda(), targets.cuda()) for inputs, targets in data(*[8] * 10, 3)]

    def epoch() -> EpochResult:
        return train_one_epoch(
            model, batches, optimizer, config, task_type="classification", step=step
        )

    epoch()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as syncs:
            warnings.simplefilter("always")
            result = epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.replayed, len([w for w in syncs if "synchroniz" in str(w.message)])) == (10, 1)
