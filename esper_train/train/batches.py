"""Batches as they come from a loader: split into inputs and targets, moved to the model's device,
grouped."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from esper_train.train.spans import Span

Batch = tuple[Any, Any]
"""Inputs and targets: tensors, or dicts, tuples and lists of tensors."""
Batches = Iterable[Any]
ReadBatch = Callable[[Any], Batch]
"""A function from a batch, as the loader gives it, to inputs and targets."""
TARGET_KEYS = ("labels", "targets", "label", "target")
"""The keys under which a dict batch may have its targets; the first one present counts."""


def require_batches(loader: object) -> None:
    """Raise `TypeError` for what cannot be iterated; nothing is begun, as `iter` would begin it."""
    if not hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__getitem__"):
        raise TypeError(
            f"expected a loader to be an iterable of batches, got {loader!r:.80}; pass a "
            "DataLoader, or a list of pairs (inputs, targets)"
        )


def drawn(
    loader: Batches,
    device: torch.device | None,
    limit: int | None,
    span: Span,
    read: ReadBatch | None = None,
) -> Iterator[Batch]:
    """The loader's batches, at most `limit`, read and moved to `device`; None leaves them where
    they are. `span` is entered around each.

    A model or a criterion may write over its batch, so it gets a copy, unless the loader says by
    `gives_copies` that its batches share no memory with its data.
    """
    if limit is not None and type(limit) is not int:
        raise TypeError(f"max_batches must be an int, or None for all batches, got {limit!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {limit}")
    require_batches(loader)
    source = iter(islice(loader, limit))
    copy = not getattr(loader, "gives_copies", False)
    read = read_batch if read is None else partial(read_by, read)
    end = object()
    empty = True
    while True:
        with span:
            batch = next(source, end)
            if batch is end:
                break
            inputs, targets = read(batch)
            if copy or not (isinstance(inputs, Tensor) and inputs.device == device):
                inputs = moved(inputs, device, copy)
            if copy or not (isinstance(targets, Tensor) and targets.device == device):
                targets = moved(targets, device, copy)
        empty = False
        yield inputs, targets
    if empty:
        raise ValueError(
            "expected at least one batch, but the loader gave no batch; the data set may be "
            "smaller than a batch with drop_last=True, or the loader an iterator that is used up: "
            "pass what can be iterated anew, such as a DataLoader or a list"
        )


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last may be shorter."""
    while group := list(islice(batches, size)):
        yield group


def read_batch(batch: object) -> Batch:
    """Inputs and targets of a pair (inputs, targets), or of a dict.

    In a dict the targets have one of the names in `TARGET_KEYS`, and the other values are the
    inputs, as a dict. Raises `TypeError` for anything else.
    """
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and batch[0] is not None and batch[1] is not None:
            return batch[0], batch[1]
    elif isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if batch.get(key) is not None), None)
        if key is not None:
            return {name: value for name, value in batch.items() if name != key}, batch[key]
    raise TypeError(
        "expected batches (inputs, targets), or dicts with targets under "
        f"{', '.join(map(repr, TARGET_KEYS))}, got {described(batch)} from the loader; pass "
        "batch=, a function from a batch to (inputs, targets), or leave broken samples out in "
        "the loader's collate_fn"
    )


def read_by(read: ReadBatch, batch: object) -> Batch:
    """The inputs and targets that the caller's own function returns for a batch."""
    found: object = read(batch)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"expected (inputs, targets) from batch={read!r}, got {described(found)} for "
            f"{described(batch)}"
        )
    return found


def moved(nest: Any, device: torch.device | None, copy: bool = False) -> Any:
    """The tensors in dicts, tuples and lists, and whatever else has a method `to`, on `device`.

    With `copy`, tensors that are there already are copied. Everything else stays as it is, and so
    do all tensors where `device` is None. Mappings of any type become dicts. Pinned memory is
    copied without waiting.
    """
    if isinstance(nest, Tensor):
        if device is None or (nest.device == device and not copy):
            return nest
        return nest.to(device, non_blocking=True, copy=copy)
    if hasattr(nest, "to") and not isinstance(nest, Mapping):  # such as a PackedSequence
        return nest if device is None else nest.to(device, non_blocking=True)
    return _rebuilt(nest, partial(moved, device=device, copy=copy))


def cloned(nest: Any) -> Any:
    """Copies of the tensors in dicts, tuples and lists."""
    return changed(nest, Tensor.clone)


def changed(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Dicts, tuples and lists with their tensors changed; anything else as it is."""
    if isinstance(nest, Tensor):
        return change(nest)
    return _rebuilt(nest, partial(changed, change=change))


def tensors(nest: Any) -> list[Tensor]:
    """The tensors in dicts, tuples and lists, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    if isinstance(nest, Mapping):
        nest = nest.values()
    elif not isinstance(nest, (tuple, list)):
        return []
    return [tensor for part in nest for tensor in tensors(part)]


def _rebuilt(nest: Any, change: Callable[[Any], Any]) -> Any:
    """A dict, tuple or list with its values changed; anything else as it is."""
    if isinstance(nest, Mapping):
        return {key: change(value) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*map(change, nest))
    if isinstance(nest, (tuple, list)):
        return type(nest)(map(change, nest))
    return nest


def described(batch: object) -> str:
    """A batch or an output in words, for an error."""
    kind = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        return f"a {kind} ({', '.join(type(part).__name__ for part in batch)})"
    if isinstance(batch, Mapping):
        return f"a {kind} with {', '.join(map(repr, batch)) or 'no keys'}"
    return "None" if batch is None else f"a {kind}"
