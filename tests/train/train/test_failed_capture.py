"""After a CUDA graph capture that failed, the process goes on, or the error says that it has to be
restarted."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_train.train.capture import CudaGraphs

ROOT = Path(__file__).parents[3]

# A step that reads on the host cannot be captured; then other captured steps, with dropout, train
# in the same process.
FAILS_THEN_TRAINS = """
import torch
from torch import Tensor, nn
from esper_train import TrainConfig, train_one_epoch
from tests.helpers.taped import data, network, sgd

class Reading(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if float(x.sum()) > 0 else 2.0)

def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> int:
    optimizer, config = sgd(*model.parameters()), TrainConfig(capture=True)
    return train_one_epoch(model, batches, optimizer, config, task_type="classification").replayed

batches, stream = data(*[8] * 8), torch.cuda.current_stream()
try:
    train(Reading(6, 5).cuda(), [(inputs.flatten(1), targets) for inputs, targets in batches])
    print("captured")
except RuntimeError as error:
    assert "captur" in str(error), error
    if any("restart the process" in note for note in getattr(error, "__notes__", ())):
        print("restart the process")
    else:
        assert torch.cuda.current_stream() == stream
        print("replayed", train(network().cuda(), batches))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_works_after_a_failed_capture_or_says_that_it_does_not() -> None:
    command = [sys.executable, "-c", FAILS_THEN_TRAINS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("replayed 5", "restart the process")


class Device:
    """Stands in for torch.cuda: captures end well or not, and the generator stays in a capture that
    did not."""

    def __init__(self, recovers: bool) -> None:
        self.recovers = recovers
        self.capturing = False
        self.random = 0

    @contextmanager
    def graph(self, *arguments: Any, **options: Any) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = not self.recovers

    def get_rng_state(self, device: torch.device) -> int:
        return self.random

    def set_rng_state(self, state: int, device: torch.device) -> None:
        self.random = state

    def rand(self, *arguments: Any, **options: Any) -> None:
        if self.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.random += 4


@pytest.mark.parametrize("recovers", [True, False])
def test_a_capture_that_succeeds_ends_the_one_that_failed(
    recovers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(recovers)
    for name in ("graph", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    monkeypatch.setattr(torch, "rand", device.rand)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(ZeroDivisionError) as caught:
        CudaGraphs(torch.device("cuda")).record(lambda: print(1 / 0))
    notes = getattr(caught.value, "__notes__", [])
    if recovers:
        assert (notes, device.capturing, device.random) == ([], False, 0)
    else:
        assert len(notes) == 1
        assert "Offset increment outside graph capture" in notes[0]
        assert notes[0].endswith("restart the process")


class _Graph:
    replay: Callable[[], None] = staticmethod(lambda: None)


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cpu")  # where the stand-in's tensors are
