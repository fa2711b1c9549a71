"""A language model of Python's standard library: its sources as bytes, or as trained byte pairs."""

import hashlib
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.morph.transformer import transformer_host
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.task import Splits, Task
from esper_train.train.data import Split

CONTEXT = 64
"""Tokens per sequence."""
TRAIN_WINDOWS = 16_384
"""The most sequences in the training split."""
HELD_OUT_WINDOWS = 512
"""The most sequences in the validation and in the test split."""
WINDOW_SEED = 0
"""Seeds the choice of sequences, which is the same for every run."""
SEPARATOR = b"\0"  # ends each file; Python sources cannot contain it
EXCLUDED = (
    r"(^|/)((site-packages|dist-packages|tests?|idle_test|lib2to3|_bundled)/"
    r"|_sysconfigdata|config-)"
)
"""Paths of tests, of bundled third-party code, and of files that depend on how Python was built."""


def pysource(config: TaskConfig) -> Task:
    """The task `pysource`: the next byte (vocab 256) or byte pair (more) in the standard library's
    sources.

    Inputs and targets are [N, 64], int64. Each file belongs to one split: about 90 % training, 5 %
    validation, 5 % test. Tokenizers are cached in `config.data`, by default in the user's cache
    directory.

    Raises:
        ValueError: a vocab below 256; on loading, too few sources, or a directory that is not
        writable.
        ImportError: on loading, a vocab above 256 without the `tokenizers` package.
    """
    vocab = config.vocab
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    if vocab < 256:
        raise ValueError(
            f"task 'pysource' needs a vocab of 256 (bytes) or more (byte pairs), got {vocab}"
        )

    def load() -> Splits:
        return load_sources(
            Path(sysconfig.get_path("stdlib")), vocab, Path(config.data or Path(caches, "esper"))
        )

    def host(size: HostConfig) -> Host:
        return transformer_host(
            vocab_size=vocab, context=CONTEXT, width=size.width or 64, depth=size.depth or 3
        )

    return Task(name="pysource", task_type="lm", num_classes=vocab, load=load, build_host=host)


def load_sources(root: Path, vocab: int, cache: Path) -> Splits:
    """Encode the sources under `root`; `ValueError` if a split is empty. Tokenizers are cached in
    `cache`."""
    files = read_sources(root)
    texts = [
        [text + SEPARATOR for name, text in files.items() if part_of(name) == part]
        for part in range(3)
    ]
    if not all(texts):
        found = [len(part) for part in texts]
        raise ValueError(
            f"expected Python sources under {root} to train, to validate and to test, got {found} "
            "files: is Python's library complete?"
        )
    named = hashlib.sha256(
        b"".join(f"{name}\0{len(text)}\0".encode() + text for name, text in files.items())
    )
    record = {
        "files": len(files),
        "bytes": sum(map(len, files.values())),
        "sha256": named.hexdigest(),
    }
    if vocab == 256:
        encoded = [torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in texts]
    else:
        strings = [[text.decode("utf-8", errors="replace") for text in part] for part in texts]
        tokenizer = load_tokenizer(strings[0], vocab, cache)
        record["tokenizer_sha256"] = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        encoded = [
            torch.cat([torch.tensor(tokenizer.encode(text).ids) for text in part])
            for part in strings
        ]
    train, validation, test = map(
        windows, encoded, (TRAIN_WINDOWS, HELD_OUT_WINDOWS, HELD_OUT_WINDOWS)
    )
    return Splits(
        train=train,
        validation=validation,
        test=test,
        record=record | {"python": platform.python_version()},
    )


def read_sources(root: Path) -> dict[str, bytes]:
    """The contents of each source by its relative path, sorted by path."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return {name: (root / name).read_bytes() for name in names if not re.search(EXCLUDED, name)}


def part_of(name: str) -> int:
    """0 training, 1 validation, 2 test; depends on the name alone, so it is the same on every
    machine."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100
    return (share >= 90) + (share >= 95)


def windows(tokens: Tensor, most: int) -> Split:
    """Cut tokens [L] into windows of 65 and return inputs and targets of at most `most` of them.

    They are drawn at random with a fixed seed.
    """
    rows = tokens[: len(tokens) - len(tokens) % (CONTEXT + 1)].view(-1, CONTEXT + 1)
    drawn = rows[
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(WINDOW_SEED))[:most]
    ].long()
    return drawn[:, :-1], drawn[:, 1:]


def load_tokenizer(texts: Sequence[str], vocab: int, cache: Path) -> Any:
    """A byte-level BPE (`tokenizers.Tokenizer`) trained on these texts, from the cache if it is
    there."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(
            "a vocab above 256 needs tokenizers: pip install 'esper-kernels[text]'"
        ) from error
    path = cache / f"bpe-{vocab}-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:16]}.json"
    # not cached yet, or damaged; the package raises only this general error
    with suppress(Exception):
        return Tokenizer.from_file(str(path))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            tokenizer.save(str(Path(scratch, "whole")))
            # atomic, so that no other process reads half a file
            os.replace(Path(scratch, "whole"), path)
    except OSError as error:
        raise ValueError(
            f"cannot write a tokenizer to {cache}: {error}; give another directory as data"
        ) from error
    return tokenizer
