"""CIFAR-10 from a directory of the user: 60,000 images of 32x32 in 10 classes. Nothing is
downloaded."""

import hashlib
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host, cnn_host
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.task import Splits, Task
from esper_train.train.data import Split

CLASSES = 10
PIXELS = 3 * 32 * 32
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
ARRAYS = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
VALIDATION_SHARE = 10  # the last tenth of the training images (5,000) is for validation
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
PADDING = 4  # black pixels around an image before it is cropped


def cifar10(config: TaskConfig) -> Task:
    """The task `cifar10`: inputs uint8 [N, 3, 32, 32], targets [N].

    Loading raises `FileNotFoundError` for missing and `ValueError` for damaged files.
    """
    load = partial(_load, config.data)
    return Task(
        name="cifar10", task_type="classification", num_classes=CLASSES, load=load, build_host=_host
    )


class Augment(nn.Module):
    """Normalize uint8 images [N, 3, H, W] to float32; in training, also shift and mirror them at
    random.

    Random numbers come from the device's default generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "mean_and_std", torch.tensor([MEAN, STD])[..., None, None], persistent=False
        )
        self.mean_and_std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            top, left = torch.randint(2 * PADDING + 1, (2, len(images)), device=images.device)
            images = crop_and_flip(
                images, top, left, torch.rand(len(images), device=images.device) < 0.5
            )
        return (images.float() / 255.0 - self.mean_and_std[0]) / self.mean_and_std[1]


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad images [N, C, H, W] with zeros, crop them at `top` [N] and `left` [N], mirror them where
    `flip` [N]."""
    n, channels, rows, columns = (torch.arange(size, device=images.device) for size in images.shape)
    rows = top[:, None] + rows
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    padded = nn.functional.pad(images, (PADDING,) * 4)
    return padded[
        n[:, None, None, None],
        channels[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


def _host(config: HostConfig) -> Host:
    host = cnn_host(
        image_size=32,
        in_channels=3,
        num_classes=CLASSES,
        width=config.width or 8,
        depth=config.depth or 3,
    )
    host.segments["early"] = nn.Sequential(Augment(), host.segments["early"])
    return host


def _load(directory: str | None) -> Splits:
    paths = _find(directory)
    parts = [_read(path) for path in paths]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    count = len(images) // VALIDATION_SHARE
    train = (images[:-count], labels[:-count])
    validation = (images[-count:], labels[-count:])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return Splits(train=train, validation=validation, test=parts[-1], record={"sha256": digest})


def _find(directory: str | None) -> list[Path]:
    places = [Path(directory, folder) for folder in FOLDERS] if directory else []
    for paths in (
        [place / (name + end) for name in FILES] for place in places for end in (".bin", "")
    ):
        if all(path.is_file() for path in paths):
            return paths
    raise FileNotFoundError(
        f"no CIFAR-10 in {directory}, or in {FOLDERS[1]} or {FOLDERS[2]} there: give --data DIR "
        "with data_batch_1.bin to data_batch_5.bin and test_batch.bin (binary layout), or without "
        ".bin (Python layout)"
    )


def _read(path: Path) -> Split:
    try:
        if path.suffix:
            records = _bytes(path.read_bytes()).view(-1, 1 + PIXELS)
            images = records[:, 1:]
            labels = records[:, 0]
        else:
            with path.open("rb") as file:
                batch = _Unpickler(file, encoding="bytes").load()
            labels, (_, shape, _, by_column, pixels) = (
                _bytes(batch[b"labels"]),
                batch[b"data"].state,
            )
            images = (
                _bytes(pixels).view(shape[::-1]).t() if by_column else _bytes(pixels).view(shape)
            )
        if images.shape != (len(labels), PIXELS) or int(labels.max()) >= CLASSES:
            found = f"{list(images.shape)} and labels up to {int(labels.max())}"
            raise ValueError(
                f"expected images [{len(labels)}, {PIXELS}] and labels below {CLASSES}, got {found}"
            )
    except Exception as error:  # loading a damaged pickle can raise any exception
        raise ValueError(
            f"{path} is damaged, or not a file of CIFAR-10: {type(error).__name__}: {error}"
        ) from error
    return images.reshape(-1, 3, 32, 32), labels.long()


def _bytes(values: Iterable[int]) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.uint8)


class _Recipe:
    """The state of a pickled array. No array is made from it, so nothing in the file can run."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in (*ARRAYS, "_codecs.encode"):
            raise pickle.UnpicklingError(f"refused to load {wanted}")
        return _Recipe if wanted in ARRAYS else bytes  # Python 3 writes bytes as encoded text
