"""The handwritten digits that come with scikit-learn: 1,797 real 8x8 images in 10 classes, no
download."""

import torch

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host, cnn_host
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.task import Splits, Task

SAMPLES = 1797
CLASSES = 10
IMAGE_SIZE = 8
BRIGHTEST = 16.0
SPLIT_SEED = 0
"""Every run has the same split: 60 % training, 20 % validation, 20 % test."""


def digits(config: TaskConfig) -> Task:
    """The task `digits`: inputs float32 [N, 1, 8, 8], standardized by the training split; targets
    [N]."""
    return Task(
        name="digits", task_type="classification", num_classes=CLASSES, load=_load, build_host=_host
    )


def _host(config: HostConfig) -> Host:
    return cnn_host(
        image_size=IMAGE_SIZE,
        in_channels=1,
        num_classes=CLASSES,
        width=config.width or 3,
        depth=config.depth or 3,
    )


def _load() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "task 'digits' needs scikit-learn: pip install 'esper-kernels[train]'"
        ) from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / BRIGHTEST
    targets = torch.as_tensor(bunch.target, dtype=torch.int64)
    if images.shape != (SAMPLES, 1, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"digits: expected {SAMPLES} images of 8x8, got {tuple(images.shape)}: install "
            "scikit-learn again"
        )
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = order.split([1078, 359, 360])
    seen = images[parts[0]]
    images = (images - seen.mean()) / seen.std()
    train, validation, test = ((images[rows], targets[rows]) for rows in parts)
    return Splits(train=train, validation=validation, test=test)
