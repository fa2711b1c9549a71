"""A task: data, its kind, and the host to learn it with. Write one for your own data and pass it to `episode`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from esper_train.config import HostConfig
from esper_train.morph.host import Host

Split = tuple[Tensor, Tensor]
IGNORED = -100
"""A target that has no part in loss or counts."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Inputs [N, ...] and targets [N] or [N, T] of each part."""

    train: Split
    validation: Split
    """For gates and controllers, which therefore see it."""
    test: Split
    """For reports only."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What identifies the data, as plain values; the run reports it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn and with what.

    `load` returns the data or raises; it never makes any up. `build_host` makes a fresh host from torch's
    global random state.
    """

    name: str
    task_type: str
    """"classification" or "lm"."""
    num_classes: int
    """Classes, or entries of the vocabulary."""
    load: Callable[[], Splits]
    build_host: Callable[[HostConfig], Host]


def load_splits(task: Task) -> Splits:
    """A task's data, checked: sizes that fit, finite inputs, targets within the classes."""
    splits = task.load()
    for name in ("train", "validation", "test"):
        inputs, targets = getattr(splits, name)
        where = f"task {task.name!r}, {name} data"
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(f"{where}: expected as many inputs as targets, got {len(inputs)} and {len(targets)}")
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise ValueError(f"{where}: the inputs have NaN or infinite values")
        bad = targets[((targets < 0) | (targets >= task.num_classes)) & (targets != IGNORED)]
        if len(bad):
            expected = f"targets in [0, {task.num_classes}), or {IGNORED} to be ignored"
            raise ValueError(f"{where}: expected {expected}, got {len(bad)} others, the first {int(bad[0])}")
    return splits


class Loader:
    """Batches (inputs, targets) of a split, the ragged last one included, for a model on `device`.

    `shuffle` gives the order, another one each epoch; nothing else draws from it. Without workers the tensors are
    indexed where they are, one operation a batch: on a CUDA device, unless they would take more than half of what is
    free there. Otherwise a `DataLoader` makes the same batches, in pinned memory for a CUDA device.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        device: torch.device = CPU,
        workers: int = 0,
    ) -> None:
        self._split, self._batch_size, self._shuffle = split, batch_size, shuffle
        self._loader: DataLoader[Any] | None = None
        self._order: list[list[int]] = []
        cuda = device.type == "cuda"
        if cuda and not workers and sum(part.nbytes for part in split) <= torch.cuda.mem_get_info(device)[0] // 2:
            self._split = split[0].to(device), split[1].to(device)
        elif cuda or workers:  # its own generator, so that it does not draw from torch's global one
            how: dict[str, Any] = {"num_workers": workers, "pin_memory": cuda, "persistent_workers": workers > 0}
            data = TensorDataset(*split)
            self._loader = DataLoader(data, None, sampler=self._order, generator=torch.Generator(), **how)

    def __len__(self) -> int:
        return -(-len(self._split[1]) // self._batch_size)

    def __iter__(self) -> Iterator[Split]:
        inputs, targets = self._split
        order = None if self._shuffle is None else torch.randperm(len(targets), generator=self._shuffle)
        if self._loader is not None:
            rows = torch.arange(len(targets)) if order is None else order
            self._order[:] = [part.tolist() for part in rows.split(self._batch_size)]
            yield from self._loader
        elif order is None:
            yield from zip(*(part.split(self._batch_size) for part in self._split), strict=True)
        else:
            for part in order.to(targets.device).split(self._batch_size):
                yield inputs.index_select(0, part), targets.index_select(0, part)
