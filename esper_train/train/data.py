"""Batches from tensors in memory, made on the model's device or by worker processes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from esper_train.base.workers import WorkerLoader

Split = tuple[Tensor, Tensor]
"""Inputs [N, ...] and targets [N] or [N, T]."""
Data = Split | Dataset[Any] | Iterable[Any]
"""A split as tensors, as a torch data set, or as a loader that gives its batches anew in each
epoch."""
CPU = torch.device("cpu")


def is_pair_of_tensors(data: object) -> TypeGuard[Split]:
    """Whether these are the inputs and targets of a whole split."""
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
    )


@dataclass(frozen=True)
class Share:
    """The data of one of several processes: a part of each batch. The parts differ by at most one
    row."""

    rank: int
    world: int

    def of(self, rows: Tensor) -> Tensor:
        """This rank's rows of a batch; there may be none."""
        return rows.tensor_split(self.world)[self.rank]


class Loader:
    """Batches (inputs, targets) of a split, the ragged last one included, for a model on `device`.

    `shuffle` gives the order, another one each epoch; nothing else draws from it. With `share`,
    batches are divided in that order, the same for all processes, and the loader gives one's own
    part of each. Without workers
    the tensors are indexed where they are, one operation per batch: on a CUDA device, unless they
    would take more than half of what is free there. Otherwise a `DataLoader` makes the same
    batches, in pinned memory for a CUDA device.
    """

    gives_copies = True

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        device: torch.device = CPU,
        workers: int = 0,
        share: Share | None = None,
    ) -> None:
        self._share = share or Share(0, 1)
        self._split = split
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._loader: WorkerLoader | None = None
        self._order: list[list[int]] = []
        cuda = device.type == "cuda"
        if (
            cuda
            and not workers
            and sum(part.nbytes for part in split) <= torch.cuda.mem_get_info(device)[0] // 2
        ):
            self._split = split[0].to(device), split[1].to(device)
        elif cuda or workers:  # a generator of its own, so that torch's global one is not used
            data = TensorDataset(*split)
            own = torch.Generator()
            self._loader = WorkerLoader(data, self._order, workers, pin_memory=cuda, generator=own)

    def __len__(self) -> int:
        return -(-len(self._split[1]) // self._batch_size)

    def __iter__(self) -> Iterator[Split]:
        """Batches that share no memory with the data: a model may write over its input."""
        inputs, targets = self._split
        rows = torch.arange(len(targets), device="cpu")
        if self._shuffle is not None:
            rows = torch.randperm(len(targets), generator=self._shuffle, device="cpu")
        if self._loader is not None:
            parts = rows.split(self._batch_size)
            self._order[:] = [self._share.of(part).tolist() for part in parts]
            yield from self._loader
        elif self._shuffle is None and self._share.world == 1:
            for x, t in zip(*(part.split(self._batch_size) for part in self._split), strict=True):
                yield x.clone(), t.clone()
        else:
            for part in rows.to(targets.device).split(self._batch_size):
                own = self._share.of(part)
                yield inputs.index_select(0, own), targets.index_select(0, own)
