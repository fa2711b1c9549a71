"""Batches as they come from a loader: checked, moved to the model's device, grouped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Inputs [N, ...] and targets [N] or [N, T]."""
Batches = Iterable[Batch]
Span = Callable[[str], AbstractContextManager[Any]]


def drawn(
    loader: Batches, device: torch.device | None, limit: int | None, span: Span
) -> Iterator[Batch]:
    """The loader's batches, at most `limit`, on `device`; None leaves them where they are."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {limit}")
    source = iter(islice(loader, limit))
    end = object()
    empty = True
    while True:
        with span("data"):
            batch = next(source, end)
            if batch is end:
                break
            inputs, targets = _pair(batch)
            if device is not None:
                inputs = inputs.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
        empty = False
        yield inputs, targets
    if empty:
        raise ValueError(
            "the loader gave no batch: is the data set smaller than a batch with drop_last=True?"
        )


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last may be shorter."""
    while group := list(islice(batches, size)):
        yield group


def _pair(batch: object) -> Batch:
    """The batch, if it is a pair of tensors; `TypeError` says what came instead."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs, targets
    raise TypeError(
        f"expected batches (inputs, targets) of two tensors, got {_described(batch)} from the "
        "loader; leave broken samples out in its collate_fn, or make such pairs there"
    )


def _described(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} ({kinds})"
    return "None" if batch is None else f"a {type(batch).__name__}"
