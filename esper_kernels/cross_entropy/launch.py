"""How the Triton kernels of cross entropy are launched: a pure function of sizes, so that it is tested without a GPU.

Nothing that a kernel is compiled for depends on the number of rows: another batch size launches the same code.
"""

from dataclasses import dataclass

COUNT_PROGRAMS = 256  # of the launch that only adds up the rows' weights
_TILE = 1024  # elements; short rows share a tile
_RESIDENT_CLASSES, _RESIDENT_CLASSES_HEAVY = 16384, 8192  # longer rows do not fit into a program's registers
_CACHE_FRACTION = 0.6  # of the second-level cache that rows in flight may fill: gradients pass through it too
_COUNT_BYTES = 512 << 10  # of targets that the programs of one multiprocessor may read to add up the weights


@dataclass(frozen=True, kw_only=True)
class Launch:
    """rows x block: the tile a program holds at a time.

    resident: a tile is whole rows, and logits are read once. Otherwise a row is read in pieces of `block` classes,
        and again from its end for the gradient, while the cache still has it.
    stages: how many tiles (resident) or pieces are on their way at once.
    programs: each takes every programs-th tile, so that few of them have sums to add up at the end.
    count_first: the rows' weights are added up by a launch of its own, else by every program for itself.
    """

    rows: int
    block: int
    resident: bool
    warps: int
    stages: int
    programs: int
    count_first: bool


def choose(
    rows: int,
    classes: int,
    element_size: int,
    target_size: int,
    heavy: bool,
    *,
    multiprocessors: int,
    cache_bytes: int,
) -> Launch:
    """For logits [rows, classes] of element_size bytes on a device with this much second-level cache.

    heavy: class weights, label smoothing or softcap are on and need registers. The figures below are what compiles
    without spilling them, at 64 a thread where several programs share a multiprocessor.
    """
    block = 1 << (classes - 1).bit_length()
    tile_rows = max(1, _TILE // block)
    limit = _RESIDENT_CLASSES_HEAVY if heavy else _RESIDENT_CLASSES
    resident = block <= limit
    if resident:
        warps = min(max(tile_rows * block // 512, 4), 16)
        # Programs that wait let others work; the one that fills the registers reads ahead instead.
        stages, at_once = (2, 1) if block == _RESIDENT_CLASSES else (1, 32 // warps)
    elif heavy:
        block, warps, stages, at_once = 2048, 16, 4, 1
    elif 2 * multiprocessors * classes * element_size <= _CACHE_FRACTION * cache_bytes:
        block, warps, stages, at_once = 2048, 8, 4, 2
    else:
        block, warps, stages, at_once = 4096, 16, 4, 1
    programs = max(1, min(-(-rows // tile_rows), multiprocessors * at_once))
    counted = rows * target_size * -(-programs // multiprocessors)
    return Launch(
        rows=tile_rows,
        block=block,
        resident=resident,
        warps=warps,
        stages=stages,
        programs=programs,
        count_first=counted > _COUNT_BYTES,
    )


def tile(classes: int) -> tuple[int, int, int]:
    """Rows, classes and warps of a tile whose elements do not depend on each other: backward."""
    block = min(1 << (classes - 1).bit_length(), 4 * _TILE)
    rows = max(1, _TILE // block)
    return rows, block, max(rows * block // 512, 4)
