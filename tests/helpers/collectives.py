"""Counts the calls of torch's collectives."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

COUNTED = {
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast_object_list",
    "reduce_scatter_tensor": "scatter",  # FSDP2's, before torch 2.13
    "reduce_scatter_single": "scatter",
}
"""Function of torch.distributed to the name under which its calls are counted."""


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """How often each was called within it."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for function, name in COUNTED.items():
            if hasattr(dist, function):
                patch.setattr(dist, function, _counting(name, getattr(dist, function), counts))
        yield counts


def _counting(name: str, function: Callable[..., Any], counts: Counter[str]) -> Any:
    def call(*args: Any, **named: Any) -> Any:
        counts[name] += 1
        return function(*args, **named)

    return call
