"""`compute_all`: the one place where device results come to the host.

`Meter.compute` and `GradStats.compute` are one-source uses of it. Do not call it inside
`torch.compile`.
"""

import struct
from typing import Any, Protocol

import torch
from torch import Tensor


class Readable(Protocol):
    """A result on a device: packs itself into 64-bit words, and is rebuilt from them on the
    host."""

    def pack(self) -> Tensor: ...  # int64 [n]; float64 numbers as their bits

    def unpack(self, words: list[int], strict: bool) -> Any: ...


def words_to_floats(words: list[int]) -> list[float]:
    """The float64 numbers whose bits are `words`."""
    return list(struct.unpack(f"={len(words)}d", struct.pack(f"={len(words)}q", *words)))


def _pack(source: Readable | Tensor) -> Tensor:
    if not isinstance(source, Tensor):
        if not hasattr(source, "pack"):
            raise TypeError(
                "compute_all reads Meter, GradStats and tensors, each as an argument of its own, "
                f"got a {type(source).__name__}; of a list pass compute_all(*sources)"
            )
        return source.pack()
    if source.dtype not in (torch.int64, torch.float64):
        raise TypeError(
            f"compute_all reads int64 and float64 tensors, got {source.dtype}; convert it on the "
            "device"
        )
    return source.detach().reshape(-1).view(torch.int64)


def _unpack(source: Readable | Tensor, words: list[int], strict: bool) -> Any:
    if not isinstance(source, Tensor):
        return source.unpack(words, strict)
    return words if source.dtype == torch.int64 else words_to_floats(words)


def compute_all(*sources: Readable | Tensor, strict: bool = True) -> tuple[Any, ...]:
    """Read any number of results with one host sync.

    sources: `Meter` (gives `MeterResult`), `GradStats` (gives `GradHealth`), or an int64 or float64
        tensor of any shape (gives the flat list of its numbers); all on one device (ValueError).
    strict: IndexError where a meter saw targets outside [0, V).
    """
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False, got {strict!r}")
    packed = [_pack(source) for source in sources]
    devices = sorted({str(words.device) for words in packed})
    if len(devices) > 1:
        raise ValueError(
            f"compute_all reads one device at a time, got sources on {devices}; call it once for "
            "each"
        )
    if not packed:
        return ()
    words = torch.cat(packed).tolist()  # the host sync
    results = []
    start = 0
    for source, part in zip(sources, packed, strict=True):
        results.append(_unpack(source, words[start : start + len(part)], strict))
        start += len(part)
    return tuple(results)
