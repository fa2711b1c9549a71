"""The number of rows of logits that exist at a time: pure functions of sizes, so that they are
tested without large tensors or a GPU."""

import torch

CPU_PANEL = 2048
"""Classes that a matrix product on the CPU takes at a time, so that its operands stay in the cache;
also the most that is converted to float32 at a time."""
_CPU_ROWS = 256
_CPU_SHARE = 20
"""The memory of a call on the CPU is that of 256 rows of logits, or a twentieth of all logits if
that is more."""
_CPU_LEAST_BYTES = 4 << 20  # below this, memory is no concern
_GPU_SHARE = 64
"""On a GPU a chunk may take this fraction of its memory. Each chunk reads and writes the float32
gradient of the weight once, which only thousands of rows make cheap beside the products."""


def chunk_rows(
    rows: int,
    classes: int,
    hidden: int,
    element_size: int,
    converts: bool,
    device_bytes: int | None = None,
) -> int:
    """The most rows of a chunk, for logits [rows, classes] of `element_size` bytes, made of rows of
    `hidden` elements.

    converts: whether products on the CPU convert their operands to float32.
    device_bytes: the memory of a GPU; None on the CPU.
    """
    row_bytes = classes * element_size
    if device_bytes is not None:
        most = device_bytes // _GPU_SHARE // row_bytes
        return _even(rows, most)
    budget = max(_CPU_ROWS * row_bytes, rows * row_bytes // _CPU_SHARE, _CPU_LEAST_BYTES)
    row_bytes += 4 * hidden  # a row of the gradient of hidden, in float32
    if converts:
        panel = min(classes, CPU_PANEL)
        row_bytes += 4 * (panel + hidden)  # of logits, and of hidden
        budget -= 4 * panel * hidden  # of the weight
    return _even(rows, budget // row_bytes)


def _even(rows: int, most: int) -> int:
    """`rows` cut into as few chunks as possible, of about the same size."""
    most = max(1, most)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def device_bytes(device: torch.device) -> int | None:
    """The memory of a GPU; None for the CPU."""
    if device.type in ("cpu", "meta"):
        return None
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)
