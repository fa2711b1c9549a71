"""The Triton kernels of cross entropy; `triton` launches them. Importing this needs Triton.

An argument that is None is a constant to the compiler, and what belongs to it is left out. Numbers
come by value or, where they are tensors of the device, by pointer; nothing that may change from
batch to batch is compiled in.

Long file, long functions: `batch` is one program that works on a whole batch, and its parts share
their variables; Triton passes no structs between functions.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
LOWEST_EXPONENT = tl.constexpr(-86.0)  # as in `reference`
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # of the normal float32 numbers
# Below it, exponentials are 0; in their products with logits it stands for those that may be -inf.
DEEP = tl.constexpr(-100.0)
LANES = tl.constexpr(256)  # results of other programs that the last program reads at a time


@triton.jit
def _number(x):
    value = x  # the interpreter makes a tensor of a float only when it is assigned
    if value.dtype.is_ptr():
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def _tanh(x):
    size = tl.abs(x)
    z = x * x
    # The odd polynomial that Cephes uses near 0, where 1 - exp(..) would cancel.
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = ((p * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    s = tl.exp(-2.0 * size)
    large = (1.0 - s) / (1.0 + s)
    return tl.where(size < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def _exp(x):
    # exp2 is one instruction on GPUs. exp has more, for results below the normal numbers.
    return tl.where(x <= LOWEST_EXPONENT, 0.0, tl.exp2(x * LOG2_E))


@triton.jit
def _capped(x, softcap):
    if softcap is not None:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _read(start, c, mask, softcap):
    """A tile: the logits as stored, `c` behind `start`, and after softcap; -inf where masked."""
    x = tl.load(start + c, mask, other=-float("inf")).to(tl.float32)
    if softcap is None:
        return x, x
    else:
        return x, tl.where(mask, _capped(x, softcap), -float("inf"))


@triton.jit
def _before_boundary(start):
    """The number of elements between the address `start` and the next 16 byte boundary."""
    size: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
    return ((16 - start.to(tl.int64) % 16) % 16 // size).to(tl.int32)


@triton.jit
def _class_weights(weight, c, V):
    if weight is None:
        return 1.0
    else:
        return tl.load(weight + c, c < V, other=0.0).to(tl.float32)


@triton.jit
def _classify(targets, row, rows, V, IGNORE: tl.constexpr):
    """The target, 0 where not valid; whether a row is valid, or ignored."""
    target = tl.load(targets + row, row < rows, other=IGNORE).to(tl.int64)
    valid = (row < rows) & (target >= 0) & (target < V) & (target != IGNORE)
    return tl.where(valid, target, 0), valid, (row < rows) & (target == IGNORE)


@triton.jit
def _row_weights(targets, weight, rows, first, step, V, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of the valid rows in every step-th block of rows, added up."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(first, tl.cdiv(rows, BLOCK), step):
        target, valid, _ = _classify(
            targets, block * BLOCK + tl.arange(0, BLOCK).to(tl.int64), rows, V, IGNORE
        )
        lanes += tl.where(valid, _class_weights(weight, target, V), 0.0)
    return tl.sum(lanes.to(tl.float64))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets"])
def count(
    targets,
    weight,
    counted,
    rows: tl.int64,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counted [programs] float64: the rows' weights, added up."""
    program = tl.program_id(0)
    tl.store(
        counted + program,
        _row_weights(targets, weight, rows, program, tl.num_programs(0), V, IGNORE, BLOCK),
    )


@triton.jit
def _offset(row, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """The offset of a row, with strides in units; rows are [outer, inner] where inner is not
    None."""
    if inner is None:
        return row * inner_stride * UNIT
    else:
        return (row // inner * outer_stride + row % inner * inner_stride) * UNIT


@triton.jit
def _next_below(x):
    """The next smaller float32; NaN for -inf."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0, -2147483647, tl.where(x > 0, bits - 1, bits + 1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _first_largest(x, c, V):
    """The index of the first largest element of each row of a tile [rows, block]."""
    return tl.min(tl.where(x == tl.max(x, 1)[:, None], c, V), 1)


@triton.jit
def _second_largest(x, top):
    """The second-largest logit of each row of a tile [rows, block] whose largest is `top`; -inf in
    a tile of one column."""
    below = tl.max(tl.where(x < top[:, None], x, -float("inf")), 1)
    return tl.where(tl.sum((x == top[:, None]).to(tl.int32), 1) > 1, top, below)


@triton.jit
def _rescaled(squares, products, total, factor, drop, ENTROPY: tl.constexpr):
    """The sums of e^2 and, with ENTROPY, of e * (x - maximum) after the maximum has risen. total:
    the sum of e before that; drop: the old maximum minus the new one; factor: exp(drop)."""
    if ENTROPY:
        products = factor * (products + tl.maximum(drop, DEEP) * total)
    return squares * factor * factor, products


@triton.jit
def _behind(stored, c, target_logit, below, target, GROUP: tl.constexpr):
    """1 for each class of a tile [rows, block] that does not rank before the target: smaller, or
    equal and not in an earlier group of classes. `_tied` has the equal ones of the target's group.

    A thread has the classes of a group, so it compares places once for all of them. below: the
    next smaller number than the target's logit, so that one comparison of logits is enough; NaN
    compares as larger.
    """
    earlier = (c & -GROUP) < (target & -GROUP)[:, None]
    bar = tl.where(earlier, below[:, None], target_logit[:, None])
    return (stored <= bar).to(tl.int32)


@triton.jit
def _tied(x_row, target, target_logit, valid, origin, GROUP: tl.constexpr):
    """The number of classes of the target's group that equal its logit and come before it. Groups
    are counted from class `origin` on; a target before it has none."""
    before = (target - origin) & (GROUP - 1)
    lane = tl.arange(0, GROUP)[None, :]
    mask = (valid & (target >= origin))[:, None] & (lane < before[:, None])
    at = x_row[:, None] + (target - before)[:, None] + lane
    equal = tl.load(at, mask, other=0.0).to(tl.float32) == target_logit[:, None]
    return tl.sum((mask & equal).to(tl.int32), 1)


@triton.jit
def _gradient(p, x, c, own, live, of_softmax, everywhere, weight, softcap, V):
    """The gradient of a tile [rows, block]. x is after softcap, p * of_softmax is the softmax's
    share, and `own` is what a target has less than other classes."""
    grad = p * of_softmax[:, None]
    if own is not None:
        grad -= own[:, None]
    if everywhere is not None:
        grad -= everywhere[:, None] * _class_weights(weight, c, V)
    if softcap is not None:
        grad *= 1.0 - (x / softcap) * (x / softcap)
    return tl.where(live[:, None] & ~(tl.abs(grad) < SMALLEST), grad, 0.0)


@triton.jit
def _store_target(g_row, row_max, x, target, own, live, of_softmax, everywhere, weight, softcap, V):
    """The gradient at one class of each row, x its logits after softcap."""
    c = target[:, None]
    p = _exp(x - row_max)[:, None]
    g = _gradient(p, x[:, None], c, own, live, of_softmax, everywhere, weight, softcap, V)
    tl.store(g_row[:, None] + c, g, live[:, None])


@triton.jit(
    do_not_specialize=["rows", "inner", "logits_outer", "logits_inner", "grad_outer", "grad_inner"],
    do_not_specialize_on_alignment=[
        "targets",
        "label_smoothing",
        "z_loss",
        "softcap",
        "normalizer",
        "grad_scale",
        "recorded",
    ],
)
def batch(
    logits,
    targets,
    second,  # with MixUp: the second target of each row, int64 [rows]
    shares,  # [2, rows] float32: those of the target and of the second
    weight,  # [V]
    label_smoothing, z_loss, softcap,
    normalizer,  # None: the rows' weights, added up here
    grad_scale,  # or the gradient of the loss, [rows] with PER_ROW
    saved_in,  # what an earlier launch wrote to saved_out
    recorded,  # the loss that other code computed, to be metered instead
    loss,  # [], or [rows] with PER_ROW, written
    # [2 rows + 1] float32, written: maximum and sum of exponentials of each row; the rows' weights,
    # added up
    saved_out,
    grad,  # like logits, written; may be the logits
    predicted,  # [rows] int32, written; or None, where no measures are wanted
    measures,  # [5, rows] float32, written: those of RowMeasures
    sums, counts,  # of the meter
    partials,  # [columns, programs] float64
    ticket,
    rows: tl.int64, inner, logits_outer, logits_inner, grad_outer, grad_inner,
    V: tl.constexpr, UNIT: tl.constexpr, IGNORE: tl.constexpr, TOPK: tl.constexpr,
    PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr, SAME_PHASE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Row losses, gradient and counts of a batch, as wanted; the program that ends last adds them
    up.

    SAME_PHASE: rows of logits and gradient begin equally far behind a boundary of 16 bytes.
    """
    COLUMNS: tl.constexpr = 6 + len(TOPK)
    PADDED: tl.constexpr = triton.next_power_of_2(COLUMNS)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if softcap is not None:
        softcap = _number(softcap)
    c = tl.arange(0, BLOCK)[None, :]
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    WORDS: tl.constexpr = BLOCK // WIDTH
    word = tl.arange(0, WORDS)
    lanes = word[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    column = tl.arange(0, PADDED)
    limit = tl.zeros([PADDED], tl.int32)  # the first rank that is not correct
    for i in tl.static_range(len(TOPK)):
        limit = tl.where(column == 6 + i, TOPK[i], limit)
    weight_sum = tl.full([ROWS], V, tl.float32)
    if weight is not None and label_smoothing is not None:
        class_weights = tl.zeros([1, BLOCK], tl.float32)
        for block in tl.range(0, tl.cdiv(V, BLOCK)):
            class_weights += _class_weights(weight, block * BLOCK + c, V)
        weight_sum = tl.sum(class_weights, 1) + tl.zeros([ROWS], tl.float32)
    if grad is not None:
        if normalizer is not None:
            denominator = _number(normalizer)
        elif saved_in is not None:
            denominator = tl.load(saved_in + 2 * rows)
        else:
            denominator = _row_weights(targets, weight, rows, 0, 1, V, IGNORE, COUNT_BLOCK).to(
                tl.float32
            )
        denominator = tl.full([ROWS], denominator, tl.float32)
    loss_lanes = tl.zeros([ROWS], tl.float64)
    weight_lanes = tl.zeros([ROWS], tl.float64)
    count_lanes = tl.zeros([ROWS, PADDED], tl.int32)

    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=1):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        target, valid, ignored = _classify(targets, row, rows, V, IGNORE)
        x_row = logits + _offset(row, inner, logits_outer, logits_inner, UNIT)
        target_logit = tl.load(x_row + target, valid, other=0.0).to(tl.float32)
        below = _next_below(target_logit)
        target_class = target.to(tl.int32)  # of a tile: comparisons of 64 bits are two
        target_x = _capped(target_logit, softcap)
        second_target = None
        if second is not None:
            second_target = tl.load(second + row, valid, other=0).to(tl.int32)
            second_x = tl.load(x_row + second_target, valid, other=0.0).to(tl.float32)
            second_x = _capped(second_x, softcap)
            share = tl.load(shares + row, valid, other=0.0)
            second_share = tl.load(shares + rows + row, valid, other=0.0)
            share_sum = share + second_share
        rank = tl.zeros([ROWS], tl.int32)
        smooth = target_x
        if not RESIDENT:
            # Whole words of 16 bytes, and the elements before and after them: the edge.
            x_start = logits + _offset(tile, inner, logits_outer, logits_inner, UNIT)
            head = _before_boundary(x_start)
            x_words = tl.multiple_of(x_start + head, 16)
            words = (V - head) // WIDTH
            blocks = tl.cdiv(words, WORDS)
            edge = tl.arange(0, 2 * WIDTH)[None, :]
            on_edge = (edge < head) | (edge >= 2 * WIDTH - (V - head) % WIDTH)
            edge = tl.where(edge < WIDTH, edge, edge + (V - 2 * WIDTH))
        if saved_in is not None:
            row_max = tl.load(saved_in + row, valid, other=0.0)
            row_sum = tl.load(saved_in + rows + row, valid, other=1.0)
        if RESIDENT:
            mask = valid[:, None] & (c < V)
            stored, x = _read(x_row[:, None], c, mask, softcap)
            if counts is not None:
                GROUP: tl.constexpr = (
                    WIDTH if ROWS == 1 else 1
                )  # short rows have few elements to save
                behind = _behind(stored, c, target_logit, below, target_class, GROUP)
                rank = BLOCK - tl.sum(behind, 1)  # masked classes count as behind
                if GROUP > 1:
                    rank += _tied(x_row, target_class, target_logit, valid, 0, GROUP)
            if saved_in is None:
                row_max = tl.max(x, 1)
            p = _exp(x - row_max[:, None])
            if saved_in is None:
                row_sum = tl.sum(p, 1)
            if predicted is not None:
                place_of_top = _first_largest(stored, c, V)
                squares = tl.sum(p * p, 1)
                if ENTROPY:
                    # not 0 * -inf
                    products = tl.sum(p * tl.maximum(x - row_max[:, None], DEEP), 1)
                    other_max = tl.max(tl.where(c == place_of_top[:, None], -float("inf"), x), 1)
            if label_smoothing is not None:
                smooth = tl.sum(
                    tl.where(mask, _class_weights(weight, c, V) * (x - row_max[:, None]), 0.0), 1
                )
        elif saved_in is None:
            # Each word has a maximum and a sum. The maximum starts below all logits, because -inf
            # must not be subtracted from -inf.
            word_max = tl.full([WORDS], LOWEST, tl.float32)
            word_sum = tl.zeros([WORDS], tl.float32)
            word_behind = tl.zeros([WORDS], tl.int32)
            word_smooth = tl.zeros([WORDS], tl.float32)
            if predicted is not None:
                word_top = tl.full([WORDS], -float("inf"), tl.float32)  # as stored
                word_block = tl.zeros([WORDS], tl.int32)  # where it was first
                word_second = tl.full([WORDS], -float("inf"), tl.float32)
                word_squares = tl.zeros([WORDS], tl.float32)
                word_products = tl.zeros([WORDS], tl.float32)
            # The maximum is not known yet, and sums of large logits would cancel.
            origin = tl.where(tl.abs(target_x) < float("inf"), target_x, 0.0)
            for block in tl.range(0, blocks * tl.max(valid.to(tl.int32), 0), num_stages=1):
                there = block * WORDS + word < words
                stored, x = _read(x_words, block * BLOCK + lanes, there[:, None], softcap)
                first = head + block * BLOCK  # class
                if counts is not None:
                    place = target_class - first
                    behind = _behind(stored, lanes, target_logit, below, place, WIDTH)
                    word_behind += tl.where(there, tl.sum(behind, 1), WIDTH)
                if label_smoothing is not None:
                    part = _class_weights(weight, first + lanes, V) * (x - origin[:, None])
                    word_smooth += tl.where(there, tl.sum(part, 1), 0.0)
                new_max = tl.maximum(word_max, tl.max(x, 1))
                if predicted is not None:
                    factor = tl.exp2((word_max - new_max) * LOG2_E)
                    depth = x - new_max[:, None]
                    e = tl.exp2(depth * LOG2_E)
                    word_squares, word_products = _rescaled(
                        word_squares, word_products, word_sum, factor, word_max - new_max, ENTROPY
                    )
                    word_squares += tl.sum(e * e, 1)
                    top = tl.max(stored, 1)
                    if ENTROPY:
                        word_products += tl.sum(e * tl.maximum(depth, DEEP), 1)
                        word_second = tl.maximum(word_second, _second_largest(stored, top))
                        word_second = tl.maximum(word_second, tl.minimum(word_top, top))
                    word_block = tl.where(top > word_top, block, word_block)
                    word_top = tl.maximum(word_top, top)
                word_sum *= tl.exp2((word_max - new_max) * LOG2_E)
                word_sum += tl.sum(tl.exp2((x - new_max[:, None]) * LOG2_E), 1)
                word_max = new_max
            read = on_edge & valid[:, None]
            edge_stored, edge_x = _read(x_row[:, None], edge, read, softcap)
            row_max = tl.maximum(tl.max(word_max[None, :], 1), tl.max(edge_x, 1))
            row_sum = tl.sum((word_sum * tl.exp2((word_max - row_max) * LOG2_E))[None, :], 1)
            row_sum += tl.sum(tl.exp2((edge_x - row_max[:, None]) * LOG2_E), 1)
            row_sum = tl.where(row_sum == 0, float("nan"), row_sum)  # nothing but -inf
            if counts is not None:
                edge_behind = _behind(edge_stored, edge, target_logit, below, target_class, 1)
                rank = blocks * BLOCK - tl.sum(word_behind[None, :], 1)
                rank += 2 * WIDTH - tl.sum(tl.where(read, edge_behind, 1), 1)
                in_word = valid & (target_class < head + words * WIDTH)
                rank += _tied(x_row, target_class, target_logit, in_word, head, WIDTH)
            edge_part = _class_weights(weight, edge, V) * (edge_x - origin[:, None])
            smooth = tl.sum(word_smooth[None, :], 1) + tl.sum(tl.where(read, edge_part, 0.0), 1)
            smooth += weight_sum * (origin - row_max)
            if predicted is not None:
                factor = tl.exp2((word_max - row_max) * LOG2_E)
                edge_depth = edge_x - row_max[:, None]
                edge_e = tl.exp2(edge_depth * LOG2_E)
                word_squares, word_products = _rescaled(
                    word_squares, word_products, word_sum, factor, word_max - row_max, ENTROPY
                )
                squares = tl.sum(word_squares[None, :], 1)
                squares += tl.sum(edge_e * edge_e, 1)
                words_top = tl.max(word_top[None, :], 1)
                edge_top = tl.max(edge_stored, 1)
                row_top = tl.maximum(words_top, edge_top)
                # The first word that has it, and the first class of that word or of the edge.
                first = tl.where(word_top == row_top, head + word_block * BLOCK + word * WIDTH, V)
                in_word = tl.min(first[None, :], 1)[:, None] + tl.arange(0, WIDTH)[None, :]
                there = valid[:, None] & (in_word < V)
                logit = tl.load(x_row[:, None] + in_word, there, other=0.0).to(tl.float32)
                place_of_top = tl.min(tl.where(there & (logit == row_top), in_word, V), 1)
                on_top = tl.where(read & (edge_stored == row_top[:, None]), edge, V)
                place_of_top = tl.minimum(place_of_top, tl.min(on_top, 1))
                if ENTROPY:
                    products = tl.sum(word_products[None, :], 1)
                    products += tl.sum(edge_e * tl.maximum(edge_depth, DEEP), 1)
                    other_max = tl.maximum(
                        _second_largest(word_top[None, :], words_top),
                        _second_largest(edge_stored, edge_top),
                    )
                    other_max = tl.maximum(other_max, tl.max(word_second[None, :], 1))
                    other_max = tl.maximum(other_max, tl.minimum(words_top, edge_top))
                    other_max = _capped(other_max, softcap)

        row_weight = tl.full([ROWS], 1.0, tl.float32)
        if weight is not None:
            row_weight = tl.load(weight + target, valid, other=0.0).to(tl.float32)
        both_weights = row_weight
        if second is not None:
            second_weight = second_share
            if weight is not None:
                second_weight *= tl.load(weight + second_target, valid, other=0.0).to(tl.float32)
            row_weight *= share
            both_weights = row_weight + second_weight
        log_sum = tl.log(row_sum)  # NaN exactly where the row is non-finite
        row_loss = row_weight * (log_sum - (target_x - row_max))
        if second is not None:
            # Not products with 0: beside a -inf logit the other factor is inf.
            known = log_sum == log_sum
            of_second = second_weight * (log_sum - (second_x - row_max))
            row_loss = tl.where((row_weight == 0) & known, 0.0, row_loss)
            row_loss += tl.where((second_weight == 0) & known, 0.0, of_second)
        if label_smoothing is not None:
            e = _number(label_smoothing)
            row_loss *= 1.0 - e
            smoothing_loss = e / V * (weight_sum * log_sum - smooth)
            if second is not None:
                smoothing_loss *= share_sum
            row_loss += tl.where(e > 0, smoothing_loss, 0.0)
        if z_loss is not None:
            penalty = _number(z_loss) * (row_max + log_sum) * (row_max + log_sum)
            if second is not None:
                penalty *= share_sum
            row_loss += penalty
        row_loss = tl.where(valid, row_loss, 0.0)
        loss_lanes += row_loss.to(tl.float64)
        weight_lanes += tl.where(valid, both_weights, 0.0).to(tl.float64)
        finite = row_sum == row_sum
        bad = (row < rows) & ~valid & ~ignored
        flags = (valid & finite)[:, None] & (rank[:, None] < limit[None, :])
        flags |= (valid[:, None] & (column == 0)) | (ignored[:, None] & (column == 1))
        flags |= ((valid & ~finite)[:, None] & (column == 2)) | (bad[:, None] & (column == 3))
        count_lanes += flags.to(tl.int32)

        if predicted is not None:
            tl.store(predicted + row, tl.where(valid & finite, place_of_top, -1), row < rows)
            tl.store(measures + row, 1.0 / row_sum, row < rows)
            nll = log_sum - (target_x - row_max)
            tl.store(measures + rows + row, nll, row < rows)
            brier = 1.0 - 2.0 * tl.exp(-nll) + squares / (row_sum * row_sum)
            tl.store(measures + 2 * rows + row, tl.maximum(brier, 0.0), row < rows)
            if ENTROPY:
                tl.store(measures + 3 * rows + row, log_sum - products / row_sum, row < rows)
                tl.store(measures + 4 * rows + row, row_max - other_max, row < rows)

        if PER_ROW and loss is not None:
            if counts is None:
                row_loss = tl.where(bad, float("nan"), row_loss)  # no meter counts it
            tl.store(loss + row, row_loss, row < rows)
        if saved_out is not None:
            tl.store(saved_out + row, row_max, row < rows)
            tl.store(saved_out + rows + row, row_sum, row < rows)
        if grad is not None:
            if PER_ROW:
                scale = tl.load(grad_scale + row, valid, other=0.0).to(tl.float32) / denominator
            else:
                scale = _number(grad_scale) / denominator
            at_target = row_weight * scale
            at_second = None
            everywhere = None
            of_softmax = at_target
            if second is not None:
                at_second = second_weight * scale
                of_softmax += at_second
            if label_smoothing is not None:
                e = _number(label_smoothing)
                at_target = at_target * (1.0 - e)
                everywhere = e / V * scale
                of_softmax = at_target
                if second is not None:
                    at_second *= 1.0 - e
                    everywhere *= share_sum
                    of_softmax += at_second
                of_softmax += everywhere * weight_sum
            if z_loss is not None:
                of_lse = 2.0 * _number(z_loss) * (row_max + log_sum) * scale
                if second is not None:
                    of_lse *= share_sum
                of_softmax += of_lse
            of_softmax /= row_sum
            live = valid & (denominator != 0)
            g_row = grad + _offset(row, inner, grad_outer, grad_inner, UNIT)
            if RESIDENT:
                g = _gradient(p, x, c, None, live, of_softmax, everywhere, weight, softcap, V)
                tl.store(g_row[:, None] + c, g, (row < rows)[:, None] & (c < V))
            else:
                g_words = grad + _offset(tile, inner, grad_outer, grad_inner, UNIT) + head
                if SAME_PHASE:
                    g_words = tl.multiple_of(g_words, 16)
                for trip in tl.range(0, blocks, num_stages=1):
                    block = blocks - 1 - trip
                    inside = (block * WORDS + word < words)[:, None]
                    at = block * BLOCK + lanes
                    x = tl.load(x_words + at, inside & live[:, None], eviction_policy="evict_first")
                    x = _capped(x.to(tl.float32), softcap)
                    p = _exp(x - row_max[:, None])
                    g = _gradient(
                        p, x, head + at, None, live, of_softmax, everywhere, weight, softcap, V
                    )
                    tl.store(g_words + at, g, inside, cache_modifier=".cs")
                edge_x = tl.load(x_row[:, None] + edge, on_edge & live[:, None], other=0.0)
                edge_x = _capped(edge_x.to(tl.float32), softcap)
                edge_p = _exp(edge_x - row_max[:, None])
                edge_g = _gradient(
                    edge_p, edge_x, edge, None, live, of_softmax, everywhere, weight, softcap, V
                )
                tl.store(g_row[:, None] + edge, edge_g, on_edge)
            tl.debug_barrier()  # all threads have stored what the targets' gradients replace
            if (
                second is not None
            ):  # where it has no share it may be the first, which comes after it
                _store_target(
                    g_row, row_max, second_x, second_target, at_second,
                    live, of_softmax, everywhere, weight, softcap, V,
                )  # fmt: skip
            _store_target(
                g_row, row_max, target_x, target_class, at_target,
                live, of_softmax, everywhere, weight, softcap, V,
            )  # fmt: skip

    if partials is not None:
        # Columns as the meter's counts; `batches` and `batches_with_valid` need no sum and make
        # room for two.
        sum_of = tl.where(column == 4, tl.sum(loss_lanes), tl.sum(count_lanes, 0).to(tl.float64))
        sum_of = tl.where(column == 5, tl.sum(weight_lanes), sum_of)
        tl.store(partials + column * programs + program, sum_of, column < COLUMNS)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
            tl.store(ticket, 0)  # for the next launch
            lane_sums = tl.zeros([PADDED, LANES], tl.float64)
            for start in tl.range(0, programs, LANES):
                lane = (start + tl.arange(0, LANES))[None, :]
                at = column[:, None] * programs + lane
                mask = (column < COLUMNS)[:, None] & (lane < programs)
                # Past the first-level cache, which does not see what other multiprocessors store.
                lane_sums += tl.load(partials + at, mask, other=0.0, cache_modifier=".cg")
            _finish(
                tl.sum(lane_sums, 1),
                column,
                loss,
                saved_out,
                sums,
                counts,
                normalizer,
                recorded,
                rows,
                COLUMNS,
                PER_ROW,
            )


@triton.jit
def _finish(
    total,
    column,
    loss,
    saved_out,
    sums,
    counts,
    normalizer,
    recorded,
    rows,
    COLUMNS,
    PER_ROW: tl.constexpr,
):
    """Write the meter and the loss. total [PADDED] float64: the columns, summed over the programs
    in order."""
    valid = tl.sum(tl.where(column == 0, total, 0.0))
    bad = tl.sum(tl.where(column == 3, total, 0.0))
    loss_sum = tl.sum(tl.where(column == 4, total, 0.0))
    weight_sum = tl.sum(tl.where(column == 5, total, 0.0))
    if recorded is not None:
        loss_sum = tl.where(valid > 0, tl.load(recorded).to(tl.float64) * valid, 0.0)
        weight_sum = valid
    if counts is not None:
        added = tl.where(
            column == 4, 1.0, tl.where(column == 5, (valid > 0).to(tl.float64), total)
        ).to(tl.int64)
        tl.store(
            counts + column, tl.load(counts + column, column < COLUMNS) + added, column < COLUMNS
        )
        tl.store(sums, tl.load(sums) + loss_sum)
        tl.store(sums + 1, tl.load(sums + 1) + weight_sum)
        tl.store(sums + 2, tl.load(sums + 2) + tl.where(valid > 0, loss_sum / weight_sum, 0.0))
    if saved_out is not None:
        tl.store(saved_out + 2 * rows, weight_sum.to(tl.float32))
    if loss is not None and not PER_ROW:
        denominator = weight_sum
        if normalizer is not None:
            denominator = _number(normalizer).to(tl.float64)
        unknown = denominator == 0
        if counts is None:
            unknown |= bad > 0
        tl.store(loss, tl.where(unknown, float("nan"), loss_sum / denominator).to(tl.float32))
