"""CIFAR-10: both file layouts read alike, bad files refused by name, images augmented one by
one.

Long file: two file layouts and damaged files of both share a writer.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_train.config import RunConfig
from esper_train.morph.config import HostConfig
from esper_train.run.start import run_fit
from esper_train.tasks.cifar10 import Augment, cifar10, crop_and_flip
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.task import Splits, load_splits

ROWS = 6  # images per file; 5 files make 30 for training and validation
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
Batches = dict[str, tuple[np.ndarray, list[int]]]


@pytest.fixture
def batches() -> Batches:
    generator = np.random.default_rng(0)
    return {
        name: (
            generator.integers(0, 256, (ROWS, 3072), dtype=np.uint8),
            generator.integers(0, 10, ROWS).tolist(),
        )
        for name in NAMES
    }


def write_binary(folder: Path, batches: Batches) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in batches.items():
        records = [
            bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)
        ]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def write_python(folder: Path, batches: Batches, protocol: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in batches.items():
        batch = {b"data": pixels, b"labels": labels, b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


def load(folder: Path) -> Splits:
    return load_splits(cifar10(TaskConfig(data=str(folder))))


def same(a: Splits, b: Splits) -> bool:
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("train", "validation", "test")]
    return all(torch.equal(s, t) for x, y in pairs for s, t in zip(x, y, strict=True))


# reading


def test_the_last_tenth_of_training_is_validation_and_the_test_batch_is_test(
    tmp_path: Path, batches: Batches
) -> None:
    splits = load(write_binary(tmp_path, batches))
    pixels = np.concatenate([batches[name][0] for name in NAMES[:-1]]).reshape(-1, 3, 32, 32)
    labels = [label for name in NAMES[:-1] for label in batches[name][1]]
    for part, expected, targets in (
        (splits.train, pixels[:27], labels[:27]),
        (splits.validation, pixels[27:], labels[27:]),
        (splits.test, batches["test_batch"][0].reshape(-1, 3, 32, 32), batches["test_batch"][1]),
    ):
        assert part[0].dtype is torch.uint8
        assert part[1].dtype is torch.int64
        assert np.array_equal(part[0].numpy(), expected)
        assert part[1].tolist() == targets


def test_a_record_is_a_label_and_the_red_green_and_blue_rows_of_an_image(
    tmp_path: Path, batches: Batches
) -> None:
    """A record made by hand: pixel 1 of row 0 is red, pixel 0 of row 1 green, the last one of all
    blue."""
    record = bytearray(3073)
    record[0] = 7
    record[1 + 1] = record[1 + 1024 + 32] = record[3072] = 255
    write_binary(tmp_path, batches)
    (tmp_path / "test_batch.bin").write_bytes(record)
    images, labels = load(tmp_path).test
    assert labels.tolist() == [7]
    assert images.nonzero().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [0, 2, 31, 31]]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_both_layouts_of_the_same_images_agree(
    tmp_path: Path, batches: Batches, protocol: int
) -> None:
    binary = load(write_binary(tmp_path / "binary", batches))
    assert same(load(write_python(tmp_path / "python", batches, protocol)), binary)


def test_the_files_of_python_2_and_old_numpy_are_read(tmp_path: Path, batches: Batches) -> None:
    """Files written by Python 2 name numpy.core, and have byte strings where Python 3 has text and
    encoded bytes."""
    binary = load(write_binary(tmp_path / "binary", batches))
    folder = write_python(tmp_path / "python", batches)
    for name, (pixels, labels) in batches.items():
        data = pixels.tobytes()
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
            + b"(K\x01(K%cM\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR" % ROWS
            + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + b"T%stb" % (len(data).to_bytes(4, "little") + data)
        )
        listed = b"(" + b"".join(b"K%c" % label for label in labels) + b"l"
        (folder / name).write_bytes(b"\x80\x02(U\x04data" + array + b"U\x06labels" + listed + b"d.")
    assert same(load(folder), binary)


def test_an_array_kept_column_by_column_is_read_row_by_row(
    tmp_path: Path, batches: Batches
) -> None:
    binary = load(write_binary(tmp_path / "binary", batches))
    by_column = {
        name: (np.asfortranarray(pixels), labels) for name, (pixels, labels) in batches.items()
    }
    assert same(load(write_python(tmp_path / "python", by_column)), binary)


@pytest.mark.parametrize(
    ("write", "folder"),
    [(write_binary, "cifar-10-batches-bin"), (write_python, "cifar-10-batches-py")],
)
def test_the_folder_the_files_are_packed_in_may_be_left_out(
    tmp_path: Path, batches: Batches, write: Callable[[Path, Batches], Path], folder: str
) -> None:
    assert same(load(write(tmp_path / folder, batches).parent), load(tmp_path / folder))


def test_the_record_tells_other_data_apart(tmp_path: Path, batches: Batches) -> None:
    first = load(write_binary(tmp_path / "a", batches)).record
    assert load(write_binary(tmp_path / "b", batches)).record == first
    batches["test_batch"][0][0, 0] ^= 1
    assert load(write_binary(tmp_path / "c", batches)).record != first


# refusals


@pytest.mark.parametrize("data", [None, "nowhere"])
def test_without_the_files_the_error_names_both_layouts_and_the_option(data: str | None) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        cifar10(TaskConfig(data=data)).load()
    for word in (
        str(data),
        "data_batch_1.bin",
        "without .bin",
        "cifar-10-batches-py",
        "--data DIR",
    ):
        assert word in str(caught.value)


def test_one_missing_file_is_missing_data(tmp_path: Path, batches: Batches) -> None:
    (write_binary(tmp_path, batches) / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: bytes([10]) + data[1:],
        lambda data: data[:3073] + bytes([255]) + data[3074:],
    ],
    ids=["cut short", "empty", "label 10", "label 255"],
)
def test_a_damaged_binary_file_is_refused_by_name(
    tmp_path: Path, batches: Batches, damage: Callable[[bytes], bytes]
) -> None:
    path = write_binary(tmp_path, batches) / "data_batch_4.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"data_batch_4\.bin is damaged"):
        load(tmp_path)


PIXELS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": PIXELS},
        {b"labels": [1, 2]},
        {b"data": PIXELS, b"labels": [1, 2, 3]},
        {b"data": PIXELS, b"labels": [1, 10]},
        {b"data": PIXELS, b"labels": [1, -1]},
        {b"data": PIXELS, b"labels": ["cat", "dog"]},
        {b"data": PIXELS.reshape(-1, 1024), b"labels": [1, 2]},
        {b"data": PIXELS.T, b"labels": [1, 2]},
        {b"data": PIXELS.astype(np.float32), b"labels": [1, 2]},
        {b"data": PIXELS[:0], b"labels": []},
        {b"data": [1, 2], b"labels": [1, 2]},
        "no batch",
    ],
    ids=lambda batch: f"{list(batch)[:2]}"[:20],
)
def test_a_pickle_that_is_no_batch_is_refused_by_name(
    tmp_path: Path, batches: Batches, batch: object
) -> None:
    path = write_python(tmp_path, batches) / "test_batch"
    path.write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(ValueError, match="test_batch is damaged"):
        load(tmp_path)


def test_a_pickle_cut_short_is_refused_by_name(tmp_path: Path, batches: Batches) -> None:
    path = write_python(tmp_path, batches) / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="data_batch_2 is damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (f"{os.system.__module__}.system", "S'touch {}'\n"),
        ("builtins.open", "S'{}'\nS'w'\n"),
        ("builtins.eval", 'S\'open("{}", "w")\'\n'),
        ("numpy.save", "S'{}'\nI1\n"),
        ("numpy.load", "S'{}'\n"),
        ("_codecs.lookup", "S'{}'\n"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_by_its_name_and_runs_none(
    tmp_path: Path, batches: Batches, name: str, arguments: str
) -> None:
    trace = tmp_path / "trace"
    module, function = name.rsplit(".", 1)
    attack = f"c{module}\n{function}\n({arguments.format(trace)}tR.".encode()
    (write_python(tmp_path, batches) / "data_batch_1").write_bytes(attack)
    with pytest.raises(ValueError, match=f"refused to load {name}"):
        load(tmp_path)
    assert not list(tmp_path.glob("trace*"))


def test_no_array_is_made_of_addresses_that_a_pickle_gives(
    tmp_path: Path, batches: Batches
) -> None:
    """numpy itself takes eight bytes for a pointer to an object here, and would follow it."""
    attack = (
        b"(S'data'\ncnumpy\nndarray\n"
        b"((I1\ntcnumpy\ndtype\n(S'O'\ntRS'\\x01\\x02\\x03\\x04\\x05\\x06\\x07\\x08'\ntR"
    )
    (write_python(tmp_path, batches) / "data_batch_1").write_bytes(attack + b"S'labels'\n(I1\nld.")
    with pytest.raises(ValueError, match="data_batch_1 is damaged"):
        load(tmp_path)


# augmentation


def shifted(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    """The definition, pixel by pixel."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                y = row + top - 4
                x = (width - 1 - column if flip else column) + left - 4
                if 0 <= y < height and 0 <= x < width:
                    result[c, row, column] = image[c, y, x]
    return result


def test_crop_and_flip_moves_each_image_by_its_own_numbers() -> None:
    images = torch.randint(1, 256, (6, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    top = torch.tensor([4, 0, 8, 3, 4, 7])
    left = torch.tensor([4, 8, 0, 4, 6, 1])
    flip = torch.tensor([False, False, True, True, True, False])
    expected = [
        shifted(*case)
        for case in zip(images, top.tolist(), left.tolist(), flip.tolist(), strict=True)
    ]
    assert torch.equal(crop_and_flip(images, top, left, flip), torch.stack(expected))


def test_crop_and_flip_by_hand() -> None:
    """One pixel down and two to the right is read 1 row and 2 columns further on; mirrored
    afterwards."""
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]], dtype=torch.uint8)

    def moved(top: int, left: int, flip: bool) -> list[list[int]]:
        return crop_and_flip(
            image, torch.tensor([top]), torch.tensor([left]), torch.tensor([flip])
        )[0, 0].tolist()

    assert moved(4, 4, False) == [[1, 2, 3], [4, 5, 6]]
    assert moved(4, 4, True) == [[3, 2, 1], [6, 5, 4]]
    assert moved(5, 6, False) == [[6, 0, 0], [0, 0, 0]]
    assert moved(5, 6, True) == [[0, 0, 6], [0, 0, 0]]
    assert moved(3, 3, False) == [[0, 0, 0], [0, 1, 2]]


def test_augment_only_normalises_outside_training() -> None:
    """Black, white and grey by hand: (value / 255 - mean) / std."""
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[1], images[2] = 255, 126
    augment = Augment().eval()
    before = torch.get_rng_state()
    result = augment(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.dtype is torch.float32
    expected = [
        [-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616],
        [0.5086 / 0.2470, 0.5178 / 0.2435, 0.5535 / 0.2616],
        [
            (126 / 255 - 0.4914) / 0.2470,
            (126 / 255 - 0.4822) / 0.2435,
            (126 / 255 - 0.4465) / 0.2616,
        ],
    ]
    assert torch.allclose(
        result, torch.tensor(expected)[..., None, None].expand(3, 3, 32, 32), atol=1e-6
    )


def test_augment_in_training_crops_flips_and_normalises_each_image_for_itself() -> None:
    """Every result is one of the 162 crops of its image, none is favoured, and both halves are
    mirrored alike."""
    count = 2000
    image = torch.randint(1, 256, (3, 32, 32), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    cases = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    crops = crop_and_flip(
        image.expand(162, -1, -1, -1), cases[:, 0], cases[:, 1], cases[:, 2].bool()
    )
    augment = Augment()
    known = augment.eval()(crops).flatten(1)
    torch.manual_seed(3)
    seen = augment.train()(image.expand(count, -1, -1, -1)).flatten(1)
    nearest = torch.cdist(seen[:, ::7], known[:, ::7]).argmin(1)  # every 7th pixel tells them apart
    assert torch.equal(seen, known[nearest])
    for column, values in ((0, 9), (1, 9), (2, 2)):
        shares = cases[nearest, column].bincount(minlength=values) / count
        # four standard deviations of a share of 1/9 or 1/2
        assert (shares - 1 / values).abs().max() < 4 * (
            1 / values * (1 - 1 / values) / count
        ) ** 0.5


def test_augment_follows_torchs_random_state() -> None:
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Augment()(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# the task


def test_host_takes_uint8_images_and_the_size_of_the_config() -> None:
    host = cifar10(TaskConfig()).build_host(HostConfig())
    assert host.slot_channels == {"early": 8, "mid": 16, "late": 32}
    # convolutions 3->8->16->32 of 3x3 without bias, batch norms, a head with bias: as the audited
    # host has it
    assert (
        sum(p.numel() for p in host.parameters())
        == 9 * (3 * 8 + 8 * 16 + 16 * 32) + 2 * 56 + 32 * 10 + 10
        == 6418
    )
    assert host(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    assert cifar10(TaskConfig()).build_host(HostConfig(width=4, depth=2)).slot_channels == {
        "early": 4,
        "mid": 8,
    }


def test_a_run_trains_on_the_files_and_is_repeatable(tmp_path: Path, batches: Batches) -> None:
    config = RunConfig(
        data=str(write_python(tmp_path, batches)),
        max_epochs=1,
        batch_size=9,
        host=HostConfig(width=2),
    )
    first, second = (run_fit(config, task=cifar10(config)) for _ in range(2))
    assert first.test is not None
    assert second.test is not None
    assert first.test.valid == ROWS
    assert first.test.loss == second.test.loss
