"""The Triton kernel of gradient statistics; `triton` launches it. Importing this needs Triton.

The program that ends the last piece of a tensor adds up the tensor; the one that ends the last
tensor adds up the list. Both add in list order, so the same gradients give the same bits, and both
belong to the one launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

WORDS = tl.constexpr(1024)  # of 16 bytes, the widest load; a program reads one such block at a time
LANES = tl.constexpr(256)  # results of other programs that a last program reads at a time


@triton.jit
def _scan(
    address,
    numel,
    begin,
    end,
    scale,
    dtype: tl.constexpr,
    words: tl.constexpr,
    careful: tl.constexpr,
):
    """Sum of squares, largest magnitude, and numbers of nonzeros, NaN and Inf in the blocks begin
    to end of `words`.

    Blocks are counted from the 16 byte boundary at or below `address`. Unless `careful`, nonzeros
    are counted before scaling and in float32, whose comparisons are faster, and NaN and Inf not at
    all.
    """
    width: tl.constexpr = 128 // dtype.primitive_bitwidth
    head = address % 16 * width // 16  # elements between the boundary and the first
    base = tl.multiple_of((address - address % 16).to(tl.pointer_type(dtype)), 16)
    lanes = tl.arange(0, words)[:, None] * width + tl.arange(0, width)[None, :]
    squares = tl.full([words], 0, tl.float64)
    largest = tl.full([words], 0, tl.float64 if careful else tl.float32)
    nonzeros = tl.full([words], 0, tl.int32)
    nans = tl.full([words], 0, tl.int32)
    infs = tl.full([words], 0, tl.int32)
    for block in range(begin, end):
        start = block * (words * width)
        low = tl.maximum(head - start, 0).to(tl.int32)
        high = tl.minimum(head + numel - start, words * width).to(tl.int32)
        inside = (lanes >= low) & (lanes < high)
        if low == 0 and high == words * width:
            x = tl.load(base + start + lanes)
        else:  # a mask of single elements makes loads of single elements
            x = tl.load(base + start + lanes, inside, 0.0)
        scaled = x.to(tl.float64) * scale
        if careful:
            # with an infinite scale, what is outside became NaN
            scaled = tl.where(inside, scaled, 0.0)
            nans += tl.sum((scaled != scaled).to(tl.int32), 1)
            infs += tl.sum((tl.abs(scaled) == float("inf")).to(tl.int32), 1)
        seen = scaled if careful else x.to(tl.float32)
        squares += tl.sum(scaled * scaled, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(seen), 1))
        nonzeros += tl.sum((seen != 0).to(tl.int32), 1)
    most = tl.max(largest, 0).to(tl.float64) * (1.0 if careful else tl.abs(scale))
    return tl.sum(squares, 0), most, tl.sum(nonzeros, 0), tl.sum(nans, 0), tl.sum(infs, 0)


@triton.jit
def _scan_carefully(address, numel, begin, end, scale, dtype: tl.constexpr):
    # a quarter: fewer registers
    return _scan(address, numel, begin * 4, end * 4, scale, dtype, WORDS // 4, True)


@triton.jit
def _measure(address, numel, begin, end, scale, dtype: tl.constexpr):
    """`_scan` of a piece. NaN and Inf are rare and show in the squares: only a piece with some is
    read again."""
    found = _scan(address, numel, begin, end, scale, dtype, WORDS, False)
    if scale == 0 or not found[0] < float("inf"):
        found = _scan_carefully(address, numel, begin, end, scale, dtype)
    return found


@triton.jit
def _is_last(ticket, count):
    """Whether this program is the last of `count` to ask, and so sees what the others wrote before
    they asked."""
    tl.debug_barrier()  # all threads have written
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket, 0)  # for the next launch
    return last


@triton.jit
def _end_tensor(partials, num_pieces, pieces, numel, norm, max_abs, zeros, nans, infs):
    """Write the results of one tensor from the partial ones of its pieces."""
    squares = tl.full([LANES], 0, tl.float64)
    largest = tl.full([LANES], 0, tl.float64)
    nonzeros = tl.full([LANES], 0, tl.float64)
    nan = tl.full([LANES], 0, tl.float64)
    inf = tl.full([LANES], 0, tl.float64)
    for start in range(0, pieces, LANES):
        at = start + tl.arange(0, LANES)
        part = partials + at
        mask = at < pieces
        squares += tl.load(part, mask, 0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, tl.load(part + num_pieces, mask, 0.0, cache_modifier=".cg"))
        nonzeros += tl.load(part + 2 * num_pieces, mask, 0.0, cache_modifier=".cg")
        nan += tl.load(part + 3 * num_pieces, mask, 0.0, cache_modifier=".cg")
        inf += tl.load(part + 4 * num_pieces, mask, 0.0, cache_modifier=".cg")
    unknown = tl.sum(nan, 0)
    tl.store(norm, tl.sqrt(tl.sum(squares, 0)))
    tl.store(max_abs, tl.where(unknown > 0, float("nan"), tl.max(largest, 0)))
    tl.store(zeros, numel - tl.sum(nonzeros, 0).to(tl.int64))
    tl.store(nans, unknown.to(tl.int64))
    tl.store(infs, tl.sum(inf, 0).to(tl.int64))


@triton.jit
def _end_list(norms, nans, infs, num_tensors, total_norm, found_inf):
    """Write the results of the list from those of its tensors."""
    squares = tl.full([LANES], 0, tl.float64)
    bad = tl.full([LANES], 0, tl.int64)
    for start in range(0, num_tensors, LANES):
        at = start + tl.arange(0, LANES)
        mask = at < num_tensors
        norm = tl.load(norms + at, mask, 0.0, cache_modifier=".cg")
        squares += norm * norm
        bad += tl.load(nans + at, mask, 0, cache_modifier=".cg")
        bad += tl.load(infs + at, mask, 0, cache_modifier=".cg")
    tl.store(total_norm, tl.sqrt(tl.sum(squares, 0)))
    tl.store(found_inf, (tl.sum(bad, 0) > 0).to(tl.float32))


@triton.jit(do_not_specialize=tuple(range(15)))  # one binary for every list
def kernel(
    addresses, layout, partials, tickets, inv_scale,
    norms, max_abs, zeros, nans, infs, total_norm, found_inf,
    num_tensors, num_pieces, piece_blocks,
):  # fmt: skip
    """The statistics of one piece; `triton._Tables` explains the arguments."""
    piece = tl.program_id(0)
    tensor = tl.load(layout + 3 * num_tensors + 1 + piece)
    address = tl.load(addresses + tensor)
    numel = tl.load(layout + tensor)
    dtype = tl.load(layout + num_tensors + tensor)
    first = tl.load(layout + 2 * num_tensors + tensor)
    pieces = tl.load(layout + 2 * num_tensors + tensor + 1) - first
    scale = tl.full([], 1.0, tl.float64) if inv_scale is None else tl.load(inv_scale).to(tl.float64)
    size = tl.where(dtype == 0, 4, tl.where(dtype == 3, 8, 2))
    begin = (piece - first) * piece_blocks
    end = tl.minimum(
        begin + piece_blocks, (address % 16 + numel * size + WORDS * 16 - 1) // (WORDS * 16)
    )
    if dtype == 0:
        found = _measure(address, numel, begin, end, scale, tl.float32)
    elif dtype == 1:
        found = _measure(address, numel, begin, end, scale, tl.bfloat16)
    elif dtype == 2:
        found = _measure(address, numel, begin, end, scale, tl.float16)
    else:
        found = _scan_carefully(address, numel, begin, end, scale, tl.float64)
    for place in tl.static_range(5):
        tl.store(partials + place * num_pieces + piece, found[place].to(tl.float64))
    if _is_last(tickets + tensor, pieces):
        columns = norms + tensor, max_abs + tensor, zeros + tensor, nans + tensor, infs + tensor
        _end_tensor(partials + first, num_pieces, pieces, numel, *columns)
        if _is_last(tickets + num_tensors, num_tensors):
            _end_list(norms, nans, infs, num_tensors, total_norm, found_inf)
