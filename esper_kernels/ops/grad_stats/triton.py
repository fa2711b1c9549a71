"""Gradient statistics on GPUs: the one launch of `triton_kernels`, for any list, through a table of
addresses.

The list is cut into pieces of the same number of bytes, a program each, however unequal the tensors
are. The tables stay with the results, for the next call that gets them as `out`; only gradients
that moved cost a copy to the device.

CUDA graphs: call `grad_stats` once before the capture, with the `out` of the capture and the
gradients, dense, where they will stay (`zero_grad(set_to_none=False)`). From then on that `out`
belongs to the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_kernels.ops.grad_stats.stats import GradStats
from esper_kernels.values import are_fake

BLOCK_BYTES = 16384  # the kernel's block
# in the order of the kernel's branches
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
NVIDIA_OPTIONS = {**OPTIONS, "maxnreg": 80}  # three programs per multiprocessor
# Besides one per tensor: enough to balance the load, few enough to add up in a single pass.
_MOST_PIECES = 16384


@dataclass
class _Tables:
    captured: bool  # a CUDA graph reads them
    key: tuple[object, ...]  # sizes and dtypes of the tensors
    found: list[int]  # their addresses, on the host
    addresses: Tensor  # int64 [T], on the device
    # int64 [3 T + 1 + P]: elements, place in DTYPES, first pieces and P; the tensor of each piece
    layout: Tensor
    partials: Tensor  # float64 [5, P]
    tickets: Tensor  # int32 [T + 1], 0 between launches
    piece_blocks: int


def fill(
    tensors: Sequence[Tensor | None],
    inv_scale: Tensor | None,
    stats: GradStats,
    instruction_set: str = "auto",
) -> None:
    from esper_kernels.ops.grad_stats.triton_kernels import kernel

    if are_fake((*tensors, inv_scale, stats.found_inf)):
        return
    columns = *stats.magnitudes.unbind(), *stats.counts.unbind()
    totals = stats.total_norm, stats.found_inf
    if not tensors:
        for total in totals:
            total.zero_()
        return
    dense = [x if x is None or _is_dense(x) else x.contiguous() for x in tensors]
    tables = _tables(dense, stats)
    memory = tables.addresses, tables.layout, tables.partials, tables.tickets
    sizes = len(tensors), tables.partials.shape[1], tables.piece_blocks
    options = NVIDIA_OPTIONS if torch.version.cuda else OPTIONS
    with torch.accelerator.device_index(stats.found_inf.device.index):
        kernel[(sizes[1],)](*memory, inv_scale, *columns, *totals, *sizes, **options)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a range of memory, in whatever order: the statistics do not depend
    on it."""
    expected = 1
    for stride, size in () if x.is_contiguous() else sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _tables(tensors: Sequence[Tensor | None], stats: GradStats) -> _Tables:
    """The tables of `stats` for these tensors, made or brought up to date without waiting for the
    device."""
    device = stats.found_inf.device
    key = (
        tuple(0 if x is None else x.numel() for x in tensors),
        tuple(torch.float32 if x is None else x.dtype for x in tensors),
    )
    found = [0 if x is None else x.data_ptr() for x in tensors]
    tables: _Tables | None = stats.workspace.get("triton")
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if tables is None or tables.key != key or tables.found != found:
        if capturing or (tables is not None and tables.captured):
            raise RuntimeError(
                "a CUDA graph needs grad_stats to find the tensors of the call before the capture, "
                "where they were, in the same out, and no other call with that out; see "
                "esper_kernels/ops/grad_stats/triton.py"
            )
        if tables is None or tables.key != key:
            tables = stats.workspace["triton"] = _new_tables(key, device)
        tables.addresses.copy_(_staged(_integers(found), device), non_blocking=True)
        tables.found = found
    tables.captured = tables.captured or capturing
    return tables


def _new_tables(
    key: tuple[tuple[int, ...], tuple[torch.dtype, ...]], device: torch.device
) -> _Tables:
    numels = _integers(key[0])
    dtypes = _integers([DTYPES.index(dtype) for dtype in key[1]])
    # Blocks are counted from a 16 byte boundary, so a tensor may reach 15 bytes further than it is
    # long.
    blocks = [
        -(-(numel * dtype.itemsize + 15) // BLOCK_BYTES) for numel, dtype in zip(*key, strict=True)
    ]
    piece_blocks = -(-sum(blocks) // _MOST_PIECES)
    pieces = _integers([-(-count // piece_blocks) for count in blocks])
    owner = torch.repeat_interleave(pieces)
    layout = torch.cat([numels, dtypes, _integers([0]), pieces.cumsum(0), owner])
    return _Tables(
        captured=False,
        key=key,
        found=[],
        addresses=torch.empty(len(numels), dtype=torch.int64, device=device),
        layout=_staged(layout, device).to(device, non_blocking=True),
        partials=torch.empty(5, len(owner), dtype=torch.float64, device=device),
        tickets=torch.zeros(len(numels) + 1, dtype=torch.int32, device=device),
        piece_blocks=piece_blocks,
    )


def _integers(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _staged(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers` in memory from which a copy to the device does not make the host wait."""
    return numbers if device.type == "cpu" else numbers.pin_memory()
