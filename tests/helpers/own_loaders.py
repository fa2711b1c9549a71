"""Tasks whose training data come from loaders of one's own: torchdata's, which has a state, over
rows and over a stream, and torch's, in this process and with two workers.

`--task tests.helpers.own_loaders:stream` finds one from the root of the tree.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from esper_train import Splits, Task
from tests.helpers import own
from tests.helpers.own import NoisyRows


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The table row by row, with noise from a generator of its own and from torch's; workers take
    turns. It knows where it stands."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._rows = inputs, targets
        self._next = 0
        self._noise = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        inputs, targets = self._rows
        while self._next < len(inputs):
            row = self._next
            self._next += 1
            if row % step == first:
                own_noise = torch.randn(inputs.shape[1], generator=self._noise)
                yield inputs[row] + 0.1 * own_noise + 0.1 * torch.rand(()), targets[row]
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "noise": self._noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        self._noise.set_state(state["noise"])


def stateful(data: Any, **options: Any) -> Any:
    """torchdata's loader in batches of 8."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, batch_size=8, **options)


def load(kind: str, workers: int) -> Splits:
    splits = own.load_table()
    inputs, targets = splits.train  # type: ignore[misc]
    rows = NoisyRows(inputs, targets)
    if kind == "stream":
        loader = stateful(Stream(inputs, targets), num_workers=workers)
    elif kind == "rows":
        loader = stateful(rows, shuffle=True, num_workers=workers)
    else:
        loader = DataLoader(rows, batch_size=8, shuffle=True, num_workers=workers)
    return replace(splits, train=loader)


def task(kind: str, workers: int) -> Task:
    return replace(own.table, name=f"{kind}-{workers}", load=partial(load, kind, workers))


rows = task("rows", 0)
rows_by_workers = task("rows", 2)
stream = task("stream", 0)
stream_by_workers = task("stream", 2)
plain_by_workers = task("plain", 2)
