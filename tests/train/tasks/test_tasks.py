"""Tasks: real data as scikit-learn has it, made-up data that is the same each time, and checks of
both.

Long file: the same checks for one task after the other.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.tasks import TASKS, Splits, Task, get_task, load_splits
from esper_train.train.data import Loader, Split

PARTS = ("train", "validation", "test")


def parts(splits: Splits) -> list[Split]:
    return [getattr(splits, name) for name in PARTS]


def same(a: Splits, b: Splits) -> bool:
    return all(
        torch.equal(s, t)
        for x, y in zip(parts(a), parts(b), strict=True)
        for s, t in zip(x, y, strict=True)
    )


# what every task must hold; cifar10 needs files, which test_cifar10.py makes

OWN_DATA = [name for name in TASKS if name != "cifar10"]


@pytest.mark.parametrize("name", OWN_DATA)
def test_load_is_the_same_each_time_and_leaves_torchs_random_state_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = get_task(name).load()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(get_task(name).load(), first)


@pytest.mark.parametrize("name", OWN_DATA)
def test_load_splits_accepts_every_task_of_the_package(name: str) -> None:
    task = get_task(name)
    assert same(load_splits(task), task.load())
    for inputs, targets in parts(task.load()):
        assert targets.dtype is torch.int64
        classes = targets.unique()
        # not every byte occurs
        assert len(classes) == task.num_classes or (name == "pysource" and len(classes) > 90)
        assert int(classes[0]) >= 0
        assert int(classes[-1]) < task.num_classes
        assert inputs.dtype is (torch.int64 if task.task_type == "lm" else torch.float32)


@pytest.mark.parametrize("name", OWN_DATA)
def test_build_host_maps_the_tasks_inputs_to_logits(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    inputs, targets = task.load().test
    logits = task.build_host(HostConfig())(inputs[:3])
    assert logits.shape == (*targets[:3].shape, task.num_classes)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_build_host_takes_width_and_depth_from_the_config(name: str) -> None:
    assert get_task(name).build_host(HostConfig()).slot_channels == {
        "early": 3,
        "mid": 6,
        "late": 12,
    }
    assert get_task(name).build_host(HostConfig(width=5, depth=2)).slot_channels == {
        "early": 5,
        "mid": 10,
    }


def test_build_host_of_the_sequence_task_takes_width_and_depth_from_the_config() -> None:
    build = get_task("synthetic-lm").build_host
    assert build(HostConfig()).slot_channels == {"early": 16, "mid": 16, "late": 16}
    host = build(HostConfig(width=7, depth=2))
    assert host.slot_channels == {"early": 7, "mid": 7}
    # 32 tokens and 16 positions; a block has two norms, four square maps of attention, and two of
    # the mlp; a last norm
    block = 2 * 14 + 4 * (7 * 7 + 7) + (7 * 28 + 28) + (28 * 7 + 7)
    assert sum(p.numel() for p in host.parameters()) == (32 + 16) * 7 + 2 * block + 14


def test_build_host_draws_from_torchs_global_random_state() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat(
            [p.flatten() for p in get_task("digits").build_host(HostConfig()).parameters()]
        )

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "nearest"), [("digit", "digits"), ("synthetic_lm", "synthetic-lm")]
)
def test_get_task_refuses_an_unknown_name_and_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="unknown task") as caught:
        get_task(name)
    assert str(caught.value) == (
        f"unknown task '{name}'; perhaps '{nearest}'? Known: {', '.join(TASKS)}"
    )


# digits


def test_digits_has_60_20_20_percent_of_the_images() -> None:
    assert [tuple(inputs.shape) for inputs, _ in parts(get_task("digits").load())] == [
        (1078, 1, 8, 8),
        (359, 1, 8, 8),
        (360, 1, 8, 8),
    ]


def test_digits_holds_every_image_of_scikit_learn_once_with_its_target() -> None:
    """Brightness runs from 0 to 16 in whole steps, so the darkest and brightest pixel undo the
    scaling."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    splits = get_task("digits").load()
    images = torch.cat([inputs for inputs, _ in parts(splits)]).double().numpy()
    targets = torch.cat([targets for _, targets in parts(splits)]).numpy()
    brightness = 16 * (images - images.min()) / (images.max() - images.min())
    assert np.abs(brightness - brightness.round()).max() < 1e-4
    ours = np.column_stack([brightness.round().reshape(len(images), -1), targets]).astype(int)
    theirs = np.column_stack([bunch.data, bunch.target]).astype(int)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
    assert not np.array_equal(ours, theirs), "the split must not follow the order of the collection"


def test_digits_is_normalised_by_its_training_part() -> None:
    splits = get_task("digits").load()
    inputs = splits.train[0].double()
    assert inputs.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert inputs.std().item() == pytest.approx(1.0, abs=1e-5)
    # so the other parts are near it, but not exactly there
    for held_out, _ in (splits.validation, splits.test):
        assert 1e-5 < abs(held_out.double().mean().item()) < 0.1


@pytest.mark.parametrize("module", ["sklearn", "sklearn.datasets"])
def test_digits_without_scikit_learn_raises_and_makes_no_data_up(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=r"task 'digits' needs scikit-learn: pip install 'esper-.*\[train\]'"
    ):
        load_splits(get_task("digits"))


def test_digits_refuses_a_collection_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.images = bunch.images[:100]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    with pytest.raises(ValueError, match=r"expected 1797 images of 8x8, got \(100, 1, 8, 8\)"):
        get_task("digits").load()


# made-up data


def test_synthetic_images_scatter_around_one_pattern_a_class() -> None:
    """The mean of about 100 images per class is within 1.5 / 10 of its pattern in each pixel, with
    noise of standard deviation 1.5."""
    splits = get_task("synthetic").load()
    assert [len(targets) for _, targets in parts(splits)] == [1024, 256, 256]
    inputs, targets = splits.train
    patterns = torch.stack([inputs[targets == c].mean(0) for c in range(10)])
    residual = inputs - patterns[targets]
    assert residual.std().item() == pytest.approx(1.5, rel=0.03)
    # the nearest training mean names the class of held-out images far more often than chance
    held_out, truth = splits.test
    distances = torch.cdist(held_out.flatten(1), patterns.flatten(1))
    assert (distances.argmin(1) == truth).float().mean().item() > 0.9


def test_synthetic_lm_targets_are_the_next_tokens() -> None:
    splits = get_task("synthetic-lm").load()
    assert [tuple(inputs.shape) for inputs, _ in parts(splits)] == [(512, 16), (128, 16), (128, 16)]
    for inputs, targets in parts(splits):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert 0 <= int(targets.min()) <= int(targets.max()) <= 31


def test_synthetic_lm_next_token_follows_from_the_last() -> None:
    """Counting token pairs in the training split predicts held-out tokens far better than chance,
    which is 1 / 32."""
    splits = get_task("synthetic-lm").load()
    counts = torch.zeros(32, 32)
    inputs, targets = splits.train
    counts.index_put_(
        (inputs.flatten(), targets.flatten()), torch.ones(inputs.numel()), accumulate=True
    )
    held_out, truth = splits.test
    assert (counts.argmax(1)[held_out] == truth).float().mean().item() > 0.3


# checks of a task's data


def own_task(**changes: Any) -> Task:
    """A task with good data of 7 samples in 3 classes, but for the changed parts."""
    good = (torch.ones(7, 2), torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    splits = replace(Splits(train=good, validation=good, test=good), **changes)

    def no_host(config: HostConfig) -> Host:
        raise AssertionError("data are checked before a host is built")

    return Task(
        name="own",
        task_type="classification",
        num_classes=3,
        load=lambda: splits,
        build_host=no_host,
    )


def test_load_splits_passes_good_data_through_unchanged() -> None:
    task = own_task()
    assert load_splits(task) is task.load()


def test_load_splits_takes_whole_number_inputs_and_sequence_targets() -> None:
    tokens = torch.tensor([[0, 1, 2, 1], [2, 2, 1, 0]])
    assert load_splits(own_task(test=(tokens, tokens))).test[1].shape == (2, 4)


TARGETS = torch.tensor([0, 1, 2])
BAD: dict[str, tuple[Callable[[], Split], str]] = {
    "more inputs": (
        lambda: (torch.ones(4, 2), TARGETS),
        r"as many inputs as targets, at least one, got 4 and 3",
    ),
    "more targets": (
        lambda: (torch.ones(2, 2), TARGETS),
        r"as many inputs as targets, at least one, got 2 and 3",
    ),
    "empty": (
        lambda: (torch.ones(0, 2), TARGETS[:0]),
        r"as many inputs as targets, at least one, got 0 and 0",
    ),
    "NaN": (
        lambda: (torch.tensor([1.0, torch.nan, 0.0]), TARGETS),
        r"the inputs have NaN or infinite values",
    ),
    "inf": (
        lambda: (torch.tensor([1.0, 0.0, -torch.inf]), TARGETS),
        r"the inputs have NaN or infinite values",
    ),
    "class too large": (
        lambda: (torch.ones(3), TARGETS + 1),
        r"expected targets in \[0, 3\), or -100 to be ignored, got 1 others, the first 3",
    ),
    "not a class, in bytes": (  # 156 is -100 for a comparison in uint8
        lambda: (torch.ones(3), (TARGETS + 154).to(torch.uint8)),
        r"expected targets in \[0, 3\), or -100 to be ignored, got 3 others, the first 154",
    ),
    "ignored targets alone": (
        lambda: (torch.ones(3), torch.full((3,), -100)),
        r"expected targets in \[0, 3\), got -100 alone, which is ignored",
    ),
    "one target": (
        lambda: (torch.ones(3), torch.tensor(1)),
        r"expected inputs \[N, \.\.\.\] and targets \[N, \.\.\.\], got shapes \(3,\) and \(\)",
    ),
    "class negative": (
        lambda: (torch.ones(3), TARGETS - 1),
        r"expected targets in \[0, 3\), or -100 to be ignored, got 1 others, the first -1",
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", list(BAD))
def test_load_splits_refuses_bad_data_and_names_the_part(part: str, fault: str) -> None:
    split, message = BAD[fault]
    with pytest.raises(ValueError, match=rf"task 'own', {part} data: .*{message}"):
        load_splits(own_task(**{part: split()}))


def test_load_splits_takes_data_sets_and_loaders() -> None:
    data = TensorDataset(torch.ones(4, 2), torch.zeros(4))
    loader = DataLoader(data, batch_size=2)
    batches = [(torch.ones(4, 2), torch.zeros(4))]
    for split in (data, loader, batches):
        assert load_splits(own_task(train=split)).train is split


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        (TensorDataset(torch.ones(0, 2)), ValueError, "the data set is empty"),
        (Dataset(), TypeError, "a data set with a length, got Dataset"),
        (None, TypeError, "or a loader that gives its batches anew in each epoch, got NoneType"),
        (iter([]), TypeError, "anew in each epoch, got list_iterator"),
        ([torch.ones(2)], TypeError, "or a list of batches, got list"),
        ((torch.ones(2), [0, 1]), TypeError, "or a list of batches, got tuple"),
        ({"x": torch.ones(2)}, TypeError, "or a list of batches, got dict"),
    ],
)
def test_load_splits_refuses_what_is_no_data(
    part: str, split: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"task 'own', {part} data: .*{message}"):
        load_splits(own_task(**{part: split}))


def test_load_must_give_splits() -> None:
    task = replace(own_task(), load=lambda: (1, 2))  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="expected load to return Splits, got"):
        load_splits(task)


# batches


def numbered(count: int) -> Split:
    """Inputs and targets from which the sample can be told."""
    numbers = torch.arange(count)
    return torch.stack([numbers, -numbers], dim=1).float(), numbers


def epoch(loader: Any) -> list[list[int]]:
    """The samples of each batch of one pass; inputs must be those of the targets."""
    batches = []
    for inputs, targets in loader:
        assert torch.equal(inputs, torch.stack([targets, -targets], dim=1).float())
        batches.append(targets.tolist())
    return batches


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(11, 4, [4, 4, 3]), (12, 4, [4, 4, 4]), (5, 64, [5]), (3, 1, [1, 1, 1]), (1, 1, [1])],
)
def test_loader_gives_every_sample_once_an_epoch(
    count: int, batch_size: int, sizes: list[int], shuffle_seed: int | None
) -> None:
    shuffle = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    loader = Loader(numbered(count), batch_size, shuffle=shuffle)
    assert len(loader) == len(sizes)
    for _ in range(3):
        batches = epoch(loader)
        assert [len(batch) for batch in batches] == sizes
        assert sorted(i for batch in batches for i in batch) == list(range(count))


def test_loader_keeps_the_order_without_a_seed() -> None:
    loader = Loader(numbered(7), 3)
    assert epoch(loader) == epoch(loader) == [[0, 1, 2], [3, 4, 5], [6]]


def test_loader_shuffles_anew_each_epoch_and_repeats_for_the_same_seed() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, again, other = (Loader(numbered(50), 16, shuffle=generator) for generator in generators)
    epochs = [epoch(first) for _ in range(3)]
    torch.manual_seed(0)  # the order owes nothing to the global random state
    assert [epoch(again) for _ in range(3)] == epochs
    assert len({str(e) for e in epochs}) == 3
    assert epoch(other) != epochs[0]


def test_loader_keeps_dtypes_and_shapes() -> None:
    tokens = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(0))
    inputs, targets = next(iter(Loader((tokens, tokens + 1), 2)))
    assert inputs.dtype is targets.dtype is torch.int64
    assert torch.equal(inputs, tokens[:2])
    assert torch.equal(targets, tokens[:2] + 1)


def test_load_splits_takes_bytes_where_there_are_more_classes_than_bytes() -> None:
    """300 would be 44 for a comparison in uint8."""
    targets = torch.tensor([0, 44, 156, 255], dtype=torch.uint8)
    task = replace(own_task(test=(torch.ones(4), targets)), num_classes=300)
    assert load_splits(task).test == task.load().test


def test_a_name_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="name of a task must be of type str, got 3"):
        replace(own_task(), name=3)


def test_load_splits_takes_targets_that_are_to_be_ignored() -> None:
    tokens = torch.tensor([[0, 1, -100, 1]])
    assert load_splits(own_task(test=(tokens, tokens))).test[1].shape == (1, 4)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_loader_gives_the_same_batches_for_any_number_of_workers(
    shuffle_seed: int | None, workers: int
) -> None:
    """Two epochs of it, the first cut short, and torch's global random state is not drawn from."""
    orders = [
        None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
        for _ in range(2)
    ]
    loaders = [
        Loader(numbered(23), 5, shuffle=o, workers=w)
        for o, w in zip(orders, (0, workers), strict=True)
    ]
    before = torch.get_rng_state()
    for count in (2, 5):
        alone, parallel = (
            [(x.clone(), y.clone()) for x, y in islice(loader, count)] for loader in loaders
        )
        assert len(alone) == len(parallel) == count
        for a, b in zip(alone, parallel, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
