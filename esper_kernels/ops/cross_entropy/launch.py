"""The launch configuration of the Triton kernels of cross entropy: a pure function of sizes, so
that it is tested without a GPU.

Nothing that a kernel is compiled for depends on the number of rows: another batch size launches the
same code.
"""

from dataclasses import dataclass
from functools import lru_cache

COUNT_PROGRAMS = 256  # of the launch that only adds up the rows' weights
_TILE = 512  # elements; short rows share a tile
# of the second-level cache that rows in flight may fill: gradients pass through it too
_CACHE_FRACTION = 0.6
# of targets that the programs of one multiprocessor may read to add up the weights
_COUNT_BYTES = 512 << 10
_REGISTERS = 65536  # of a multiprocessor

# For rows that fit into registers, by `burdens`: the longest such row, warps, and the most programs
# per multiprocessor that compile without spilling. While some of them wait for memory, others
# compute.
_RESIDENT = {
    0: ((1024, 4, 5), (2048, 4, 5), (4096, 8, 3), (8192, 8, 2), (16384, 16, 1)),
    1: ((1024, 4, 5), (2048, 4, 4), (4096, 8, 2), (8192, 16, 1)),
    2: ((256, 4, 3), (512, 4, 4), (1024, 4, 5), (2048, 4, 4), (4096, 8, 2), (8192, 16, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """rows x block: the tile a program holds at a time.

    resident: a tile is whole rows, and logits are read once. Otherwise a row is read in pieces of
        `block` classes, and again from its end for the gradient, while the cache still has it.
    registers: the limit per thread with which all programs of a multiprocessor fit.
    programs: they stride over the tiles, so few partial sums remain to be added up at the end.
    count_first: a separate launch adds up the rows' weights; otherwise each program does it.
    """

    rows: int
    block: int
    resident: bool
    warps: int
    registers: int
    programs: int
    count_first: bool


@lru_cache(maxsize=1024)  # sizes that a run repeats
def choose(
    rows: int,
    classes: int,
    element_size: int,
    target_size: int,
    burdens: int,
    multiprocessors: int,
    cache_bytes: int,
) -> Launch:
    """The launch for logits [rows, classes] and targets of these sizes in bytes; cache_bytes is the
    size of the second-level cache.

    burdens: how many of these need registers: options (class weights, label smoothing or softcap),
        and measures.
    """
    block = max(8, 1 << (classes - 1).bit_length())
    tile_rows = 1
    fitting = [row[1:] for row in _RESIDENT[burdens] if block <= row[0]]
    # should stay in the cache until read again
    in_flight = multiprocessors * classes * element_size
    if fitting:
        tile_rows = max(1, _TILE // block)
        warps, at_once = fitting[0]
    elif burdens:
        block = 4096
        warps = 16
        at_once = 1
    elif 2 * in_flight <= _CACHE_FRACTION * cache_bytes:
        block = 4096
        warps = 8
        at_once = 2
    else:
        block = 8192
        warps = 16
        at_once = 1
    programs = max(1, min(-(-rows // tile_rows), multiprocessors * at_once))
    return Launch(
        rows=tile_rows,
        block=block,
        resident=bool(fitting),
        warps=warps,
        registers=_REGISTERS // (32 * warps * at_once) // 8 * 8,
        programs=programs,
        count_first=rows * target_size * -(-programs // multiprocessors) > _COUNT_BYTES,
    )
