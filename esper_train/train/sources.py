"""The sources of a run's batches: tensors in memory, a data set, or a user's loader.

`make_source` chooses; the run iterates over the source once per epoch, and saves its state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from esper_train.base.state import seeded
from esper_train.base.workers import GuardedLoader, WorkerLoader
from esper_train.train.batches import Batch, ReadBatch, moved, read_batch, read_by
from esper_train.train.data import Data, Loader, Share, is_pair_of_tensors

CPU = torch.device("cpu")
LARGEST_SEED = 2**62
SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers of torch whose whole state is a generator's, or the global one's."""


class Source(Protocol):
    """The batches of one split. Its state is the position of its random numbers and data between
    two epochs."""

    inexact: str | None
    """Why a resumed run may get other batches than one that was never stopped; None where it gets
    the same."""

    def __iter__(self) -> Iterator[Any]: ...

    def length(self) -> int | None:
        """Batches per epoch; None where that is not known in advance."""

    def example(self) -> Any:
        """A batch, without any change to the batches that follow."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


def make_source(
    data: Data,
    batch_size: int,
    *,
    shuffle: torch.Generator | None = None,
    device: torch.device = CPU,
    workers: int = 0,
    share: Share | None = None,
) -> Source:
    """The batches of `data`, or one process's share of each; `batch_size`, `shuffle` and `workers`
    are for all but loaders, which are used as they are and cannot be shared (`ValueError`)."""
    if share is not None:
        _require_shareable(data, batch_size, workers, share)
    if is_pair_of_tensors(data):
        return TensorSource(
            data, batch_size, shuffle=shuffle, device=device, workers=workers, share=share
        )
    pin_memory = device.type == "cuda"
    if isinstance(data, IterableDataset):
        return LoaderSource(
            DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=pin_memory)
        )
    if isinstance(data, Dataset):
        return DatasetSource(
            data,
            batch_size,
            shuffle=shuffle,
            workers=workers,
            pin_memory=pin_memory,
            share=share,
        )
    return LoaderSource(data)


def _require_shareable(data: Data, batch_size: int, workers: int, share: Share) -> None:
    """`ValueError` for data whose batches cannot be divided between processes."""
    tensors = is_pair_of_tensors(data)
    if not tensors and (not isinstance(data, Dataset) or isinstance(data, IterableDataset)):
        raise ValueError(
            "with distributed.strategy, expected training data as a pair of tensors or a map-style "
            f"Dataset, whose batches can be divided, got a {type(data).__name__}; return one of "
            "these from the task, or train in one process"
        )
    if tensors and not workers:
        return  # a share without rows is a batch of no rows
    rows = len(data[1]) if is_pair_of_tensors(data) else len(cast(Sized, data))
    smallest = rows % batch_size or batch_size
    if min(smallest, batch_size) < share.world:
        raise ValueError(
            f"{rows} rows in batches of {batch_size} leave a last batch of {smallest}, fewer than "
            f"the {share.world} processes, and a data set or a worker cannot give a batch of no "
            "rows; choose another batch_size, or, for tensors in memory, workers = 0"
        )


class _Stateless:
    """A source that draws only from the run's random numbers: exact, with nothing to save."""

    inexact: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        pass


class TensorSource(_Stateless, Loader):
    """Tensors in memory."""

    def length(self) -> int:
        return len(self)

    def example(self) -> Any:
        return tuple(part[: self._batch_size] for part in self._split)


class DatasetSource(_Stateless):
    """A map-style data set in an order of our own, collated as torch's `DataLoader` does.

    Random numbers that samples draw from python's, numpy's and torch's global generators start anew
    for each batch, from a seed out of `shuffle`. So they are the same for any number of workers,
    and in a resumed run; without `shuffle` they are the same in each epoch.
    """

    gives_copies = True  # collated

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        share: Share | None = None,
    ) -> None:
        self._share = share or Share(0, 1)
        self._size = len(cast(Sized, data))
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._batches = _SeededBatches(data)
        self._order: list[tuple[int, list[int]]] = []
        # a generator of its own, so that torch's global one is not used
        self._loader = WorkerLoader(
            self._batches,
            self._order,
            workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        rows = torch.arange(self._size, device="cpu")
        seeds = torch.arange(self.length(), device="cpu")
        if self._shuffle is not None:
            rows = torch.randperm(self._size, generator=self._shuffle, device="cpu")
            size = seeds.shape
            seeds = torch.randint(LARGEST_SEED, size, generator=self._shuffle, device="cpu")
        seeds += self._share.rank  # processes draw different numbers for their rows
        parts = rows.split(self._batch_size)
        places = [self._share.of(part).tolist() for part in parts]
        self._order[:] = list(zip(seeds.tolist(), places, strict=True))
        return iter(self._loader)

    def length(self) -> int:
        return -(-self._size // self._batch_size)

    def example(self) -> Any:
        return self._batches[0, list(range(min(self._size, self._batch_size)))]


class _SeededBatches(Dataset[Any]):
    """A function from (seed, rows) to a batch, whose samples draw random numbers from that seed."""

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __getitem__(self, place: tuple[int, Sequence[int]]) -> Any:
        seed, rows = place
        with seeded(seed):
            several = getattr(self._data, "__getitems__", None)
            samples = [self._data[row] for row in rows] if several is None else several(rows)
        return default_collate(samples)


class LoaderSource:
    """A user's loader, used as it is.

    With `state_dict` and `load_state_dict`, as torchdata's `StatefulDataLoader` has, these are its
    state once it has begun; before, it is as it was made. Of torch's `DataLoader` over a map-style
    data set with one of torch's own samplers, it is the state of the generators; without generators
    they draw from the run's random numbers. A list of batches needs none. Any other loader is used,
    but cannot promise that a resumed run gets the same batches: `inexact` says why.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._guarded = GuardedLoader(loader)
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._begun = False
        self._loaded: Mapping[str, Any] = {}  # the state to begin from
        self.inexact = None if self._stateful else _why_inexact(loader)

    def __iter__(self) -> Iterator[Any]:
        # An epoch may end within the loader's, by max_batches. Going on from a state is then not
        # the same as beginning anew, so every run does it, not only a resumed one.
        if self._stateful and self._begun:
            self.load_state_dict(self._state())
        self._begun = True
        return iter(self._guarded)

    def length(self) -> int | None:
        try:
            return len(cast(Sized, self._loader))
        except TypeError:  # a loader without a length, or over data without one
            return None

    def example(self) -> Any:
        with seeded(0):
            before = self._state()
            batch = next(iter(self._guarded), None)
            if batch is None:
                raise ValueError(
                    "a loader gave no batch: is the data set smaller than a batch with "
                    "drop_last=True?"
                )
            self.load_state_dict(before)
        return batch

    def state_dict(self) -> dict[str, Any]:
        # A loader that has not begun may have to begin for its state, which starts its workers
        # and draws from the run's random numbers.
        if self._stateful and not self._begun:
            return dict(self._loaded)
        return self._state()

    def _state(self) -> dict[str, Any]:
        if self._stateful:
            with self._guarded.starting():
                return {"loader": cast(Any, self._loader).state_dict()}
        return {name: each.get_state() for name, each in self._generators().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        if not self._stateful:
            for name, each in self._generators().items():
                each.set_state(state_dict[name])
        elif state_dict:
            cast(Any, self._loader).load_state_dict(state_dict["loader"])
            self._loaded = state_dict
            self._begun = False

    def _generators(self) -> dict[str, torch.Generator]:
        """The generators of a `DataLoader`, by where they are."""
        holders = {"own": self._loader, "sampler": getattr(self._loader, "sampler", None)}
        found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
        return {name: each for name, each in found.items() if isinstance(each, torch.Generator)}


class ReadSource:
    """The batches of another source as (inputs, targets) on `device`, changed there by `augment`,
    which may write over what it gets.

    `read` is as in `build_train_step`.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        *,
        read: ReadBatch | None = None,
        augment: Callable[[Any, Any], Batch] | None = None,
    ) -> None:
        self._source = source
        self._device = device
        self._read = read_batch if read is None else partial(read_by, read)
        self._augment = augment
        self._copies = augment is not None and not getattr(source, "gives_copies", False)
        self.inexact = source.inexact

    def __iter__(self) -> Iterator[Batch]:
        return map(self._prepared, self._source)

    def _prepared(self, batch: Any) -> Batch:
        inputs, targets = self._on_device(batch)
        return (inputs, targets) if self._augment is None else self._augment(inputs, targets)

    def _on_device(self, batch: Any) -> Batch:
        inputs, targets = self._read(batch)
        return tuple(moved(part, self._device, self._copies) for part in (inputs, targets))

    def length(self) -> int | None:
        return self._source.length()

    def example(self) -> Batch:
        """A batch before it is augmented."""
        return self._on_device(self._source.example())

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._source.load_state_dict(state_dict)


def _why_inexact(loader: Iterable[Any]) -> str | None:
    """The reason why a loader without a state of its own cannot promise the same batches, if there
    is one."""
    if type(loader) in (list, tuple):
        return None  # the same batches in each epoch
    if type(loader) is not DataLoader:
        return f"{type(loader).__name__} has no state_dict and load_state_dict"
    if isinstance(loader.dataset, IterableDataset):
        return "where an iterable data set stands is not known"
    if type(loader.sampler) not in SAMPLERS or type(loader.batch_sampler) is not BatchSampler:
        return f"the state of its sampler, {type(loader.sampler).__name__}, is not known"
    if loader.persistent_workers:
        return "persistent workers keep random numbers of their own"
    return None
