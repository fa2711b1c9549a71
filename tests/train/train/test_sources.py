"""Sources of batches: data sets and loaders of one's own, the same for any number of workers and
after a resume."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from esper_train.base.state import RandomState, seeded
from esper_train.train.sources import LoaderSource, ReadSource, Source, make_source
from tests.helpers.own_loaders import Stream

CPU = torch.device("cpu")
ROWS = 11


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples that draw from every global generator."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        noise = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
        return torch.tensor([float(row), *noise]), row


class Counted:
    """A loader with a state, which counts on over its epochs of four batches."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.position += 1
            yield torch.tensor(self.position)
            if self.position % 4 == 0:
                return

    def __len__(self) -> int:
        return 4

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def shuffled_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, **options)


def passes(source: Source, count: int = 2) -> list[Any]:
    return [[part for batch in source for part in batch] for _ in range(count)]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return len(first) == len(second) and all(map(equal, first, second))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_gives_the_same_numbers_for_any_count_of_workers(workers: int) -> None:
    def drawn(count: int) -> list[Any]:
        order = torch.Generator().manual_seed(3)
        return passes(make_source(Noisy(), 3, shuffle=order, workers=count))

    alone = drawn(0)
    assert equal(alone, drawn(workers))
    assert not equal(alone[0], alone[1])  # each epoch has an order and noise of its own


def test_a_data_set_gives_every_sample_once_and_draws_nothing_from_the_callers_numbers() -> None:
    before = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    order = torch.Generator().manual_seed(0)
    source = make_source(Noisy(), 4, shuffle=order)
    batches = list(source)
    assert [len(rows) for _, rows in batches] == [4, 4, 3]
    assert source.length() == 3
    assert sorted(int(row) for _, rows in batches for row in rows) == list(range(ROWS))
    after = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_held_out_samples_are_the_same_in_each_epoch() -> None:
    first, second = passes(make_source(Noisy(), 4))
    assert equal(first, second)
    assert [int(row) for part in first[1::2] for row in part] == list(range(ROWS))


def test_a_data_set_of_tensors_gives_what_the_tensors_give() -> None:
    inputs = torch.randn(ROWS, 2)
    targets = torch.arange(ROWS)
    order = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = list(make_source((inputs, targets), 4, shuffle=order[0]))
    sampled = list(make_source(TensorDataset(inputs, targets), 4, shuffle=order[1]))
    assert equal(whole, sampled)


def stateful_loader(data: Any, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    with seeded(4):  # it makes its generator from torch's global one, as a task loads under a seed
        return torchdata.StatefulDataLoader(data, batch_size=3, **options)


def stream() -> Stream:
    return Stream(torch.arange(ROWS * 1.0)[:, None], torch.arange(ROWS))


def exact_loaders() -> dict[str, Callable[[], Any]]:
    """Loaders that promise the same batches after a resume."""
    return {
        "state of its own": Counted,
        "list": lambda: [torch.full((1,), float(i)) for i in range(4)],
        "shuffled": shuffled_loader,
        "own generator": lambda: shuffled_loader(generator=torch.Generator().manual_seed(7)),
        "sampler's generator": lambda: DataLoader(
            Noisy(),
            batch_size=3,
            sampler=RandomSampler(range(ROWS), generator=torch.Generator().manual_seed(8)),
        ),
        "workers": lambda: shuffled_loader(num_workers=2),
        "torchdata": lambda: stateful_loader(Noisy(), shuffle=True),
        "torchdata, workers": lambda: stateful_loader(Noisy(), shuffle=True, num_workers=2),
        "torchdata, stream": lambda: stateful_loader(stream()),
        "torchdata, stream, workers": lambda: stateful_loader(stream(), num_workers=2),
    }


@pytest.mark.parametrize("kind", list(exact_loaders()))
@pytest.mark.parametrize("limit", [None, 2])
def test_a_loader_goes_on_where_it_was(kind: str, limit: int | None) -> None:
    """A run of four epochs, and one that stops after two and is resumed in a new process. With a
    limit, as by max_batches, an epoch ends within the loader's."""

    def epochs(source: Source, count: int) -> list[list[Any]]:
        return [list(zip(range(limit or 99), iter(source), strict=False)) for _ in range(count)]

    make = exact_loaders()[kind]
    source = LoaderSource(make())
    assert source.inexact is None
    with RandomState(0, CPU).active():
        whole = epochs(source, 4)
    stopped = LoaderSource(make())
    numbers = RandomState(0, CPU)
    with numbers.active():
        begun = epochs(stopped, 2)
        state = stopped.state_dict()
        stands = numbers.state_dict()
    resumed = LoaderSource(make())
    resumed.load_state_dict(state)
    numbers = RandomState(0, CPU)
    numbers.load_state_dict(stands)
    with numbers.active():
        rest = epochs(resumed, 2)
    plain = [[batch for _, batch in epoch] for epoch in whole]
    again = [[batch for _, batch in epoch] for epoch in begun + rest]
    assert equal(plain, again)
    assert equal(plain[2], plain[3]) == (kind == "list")


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6.0))


class Own:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6.0))


class OddOnly(RandomSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: Own(), "Own has no state_dict and load_state_dict"),
        (lambda: DataLoader(Endless(), batch_size=2), "iterable data set"),
        (lambda: DataLoader(Noisy(), sampler=OddOnly(range(4))), "state of its sampler, OddOnly"),
        (
            lambda: shuffled_loader(num_workers=1, persistent_workers=True),
            "persistent workers keep random numbers",
        ),
    ],
)
def test_a_loader_that_cannot_promise_says_why(loader: Callable[[], Any], reason: str) -> None:
    source = LoaderSource(loader())
    assert source.inexact is not None
    assert reason in source.inexact


def test_an_iterable_data_set_is_batched() -> None:
    source = make_source(Endless(), 4)
    assert [batch.tolist() for batch in source] == [[0, 1, 2, 3], [4, 5]]
    assert source.length() is None
    assert source.inexact is not None


@pytest.mark.parametrize("kind", [*exact_loaders(), "data set"])
def test_an_example_changes_nothing_that_follows(kind: str) -> None:
    def first(look: bool) -> list[Any]:
        order = torch.Generator().manual_seed(1)
        data = Noisy() if kind == "data set" else exact_loaders()[kind]()
        source = make_source(data, 3, shuffle=order)
        with RandomState(0, CPU).active():
            if look:
                source.example()
            return list(source)

    assert equal(first(look=True), first(look=False))


def test_a_loader_without_batches_is_refused() -> None:
    source = LoaderSource(DataLoader(Noisy(), batch_size=99, drop_last=True))
    with pytest.raises(ValueError, match="gave no batch"):
        source.example()


def test_augmentation_draws_from_the_runs_numbers() -> None:
    """The same numbers twice, others than without, and nothing else is changed."""
    data = torch.ones(6, 2), torch.arange(6)

    def noisy(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + torch.rand_like(inputs), targets

    def drawn() -> list[Any]:
        source = ReadSource(make_source(data, 4), CPU, augment=noisy)
        assert (source.length(), source.inexact, source.state_dict()) == (2, None, {})
        assert torch.equal(source.example()[0], torch.ones(4, 2))
        with RandomState(0, CPU).active():
            return list(source)

    first = drawn()
    assert equal(first, drawn())
    assert not torch.equal(first[0][0], torch.ones(4, 2))
    assert torch.equal(data[0], torch.ones(6, 2))


def test_augmentation_in_place_leaves_the_data_alone() -> None:
    batches = [(torch.ones(4, 2), torch.zeros(4)) for _ in range(2)]

    def negate(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.neg_(), targets.add_(1)

    source = ReadSource(make_source(batches, 4), torch.device("cpu"), augment=negate)
    for _ in range(2):
        for inputs, targets in source:
            assert (inputs == -1).all()
            assert (targets == 1).all()
    assert all((inputs == 1).all() and (targets == 0).all() for inputs, targets in batches)


def test_batches_are_read_by_the_callers_function() -> None:
    batches = [{"pixels": torch.ones(2, 3), "extra": 1, "kind": torch.tensor([0, 1])}]
    source = ReadSource(LoaderSource(batches), CPU, read=lambda b: (b["pixels"], b["kind"]))
    ((inputs, targets),) = source
    assert torch.equal(inputs, torch.ones(2, 3))
    assert targets.tolist() == [0, 1]
    wrong = ReadSource(LoaderSource(batches), CPU, read=lambda b: b["pixels"])
    with pytest.raises(TypeError, match=r"expected \(inputs, targets\) from batch="):
        list(wrong)
