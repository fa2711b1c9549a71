"""Generated data for tests and first experiments: noisy patterns, and sequences of a Markov
chain."""

import torch
from torch import Tensor

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host, cnn_host
from esper_train.morph.transformer import transformer_host
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.task import Splits, Task
from esper_train.train.data import Split

DATA_SEED = 0
CLASSES = 10
IMAGE_SIZE = 8
NOISE = 1.5
VOCABULARY = 32
SEQUENCE = 16


def synthetic(config: TaskConfig) -> Task:
    """The task `synthetic`: one random 8x8 pattern per class, with Gaussian noise added."""

    def host(size: HostConfig) -> Host:
        width = size.width or 3
        depth = size.depth or 3
        return cnn_host(
            image_size=IMAGE_SIZE, in_channels=1, num_classes=CLASSES, width=width, depth=depth
        )

    return Task(
        name="synthetic",
        task_type="classification",
        num_classes=CLASSES,
        load=_load_patterns,
        build_host=host,
    )


def synthetic_lm(config: TaskConfig) -> Task:
    """The task `synthetic-lm`: sequences of a random Markov chain; the next token depends on the
    last."""

    def host(size: HostConfig) -> Host:
        width = size.width or 16
        depth = size.depth or 3
        return transformer_host(vocab_size=VOCABULARY, context=SEQUENCE, width=width, depth=depth)

    return Task(
        name="synthetic-lm",
        task_type="lm",
        num_classes=VOCABULARY,
        load=_load_chain,
        build_host=host,
    )


def _load_patterns() -> Splits:
    generator = torch.Generator().manual_seed(DATA_SEED)
    patterns = torch.randn(CLASSES, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)

    def part(count: int) -> Split:
        targets = torch.randint(CLASSES, (count,), generator=generator)
        noise = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return patterns[targets] + NOISE * noise, targets

    return Splits(train=part(1024), validation=part(256), test=part(256))


def _load_chain() -> Splits:
    generator = torch.Generator().manual_seed(DATA_SEED)
    chances = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=1)

    def part(count: int) -> Split:
        tokens: list[Tensor] = [torch.randint(VOCABULARY, (count,), generator=generator)]
        for _ in range(SEQUENCE):
            tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator).squeeze(1))
        sequences = torch.stack(tokens, dim=1)
        return sequences[:, :-1], sequences[:, 1:]

    return Splits(train=part(512), validation=part(128), test=part(128))
