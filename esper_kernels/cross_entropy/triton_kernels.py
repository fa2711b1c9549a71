"""The Triton kernels of cross entropy; `triton` launches them. Importing this needs Triton.

An argument that is None is a constant to the compiler, and what belongs to it is left out. Numbers arrive by value
or, where they are tensors of the device, by pointer. No value is compiled in that may change from batch to batch.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _number(x):
    value = x
    if value.dtype.is_ptr():
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def _tanh(x):
    size, z = tl.abs(x), x * x
    # The odd polynomial that Cephes uses near 0, where 1 - exp(..) would cancel.
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = ((p * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    s = tl.exp(-2.0 * size)
    large = (1.0 - s) / (1.0 + s)
    return tl.where(size < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def _capped(x, softcap):
    if softcap is not None:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _classify(targets, row, rows, V: tl.constexpr, IGNORE: tl.constexpr):
    inside = row < rows
    target = tl.load(targets + row, inside, other=0).to(tl.int64)
    ignored = inside & (target == IGNORE)
    in_range = (target >= 0) & (target < V)
    valid = inside & in_range & (target != IGNORE)
    return tl.where(valid, target, 0), valid, ignored, inside & ~ignored & ~in_range


@triton.jit
def _weight_sum(targets, weight, rows, first, step, V: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of the valid rows in every step-th block of rows, added up."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(first, tl.cdiv(rows, BLOCK), step):
        row = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        target, valid, _, _ = _classify(targets, row, rows, V, IGNORE)
        if weight is None:
            lanes += valid.to(tl.float32)
        else:
            lanes += tl.load(weight + target, valid, other=0.0).to(tl.float32)
    return tl.sum(lanes.to(tl.float64))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets"])
def count(targets, weight, counted, rows: tl.int64, V: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """counted [programs] float64: the rows' weights, added up."""
    program = tl.program_id(0)
    tl.store(
        counted + program, _weight_sum(targets, weight, rows, program, tl.num_programs(0), V, IGNORE, BLOCK)
    )


@triton.jit
def _offset(row, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """Of a row in memory, by strides in units; [outer, inner] rows where inner is not None."""
    if inner is None:
        return row * inner_stride * UNIT
    else:
        return (row // inner * outer_stride + row % inner * inner_stride) * UNIT


@triton.jit
def _weights(weight, c, V: tl.constexpr):
    """Class weights of the columns c, 0 past the last."""
    if weight is None:
        return (c < V).to(tl.float32)
    else:
        return tl.load(weight + c, c < V, other=0.0).to(tl.float32)


@triton.jit
def _coefficients(scale, row_weight, weight_sum, lse, label_smoothing, z_loss, V: tl.constexpr):
    """What the softmax, the target and every class weight are multiplied by in a row's gradient."""
    at_target, everywhere = row_weight * scale, scale
    of_softmax = at_target
    if label_smoothing is not None:
        e = _number(label_smoothing)
        at_target, everywhere = at_target * (1.0 - e), e / V * scale
        of_softmax = at_target + everywhere * weight_sum
    if z_loss is not None:
        of_softmax += 2.0 * _number(z_loss) * lse * scale
    return of_softmax, at_target, everywhere


@triton.jit
def _gradient(p, x, c, target, live, of_softmax, at_target, everywhere, weight, label_smoothing, softcap, V):
    """Of a tile, [rows, block]; p times of_softmax is the softmax' part. x: after softcap."""
    grad = p * of_softmax[:, None]
    grad = tl.where(c == target[:, None], grad - at_target[:, None], grad)
    if label_smoothing is not None:
        grad -= everywhere[:, None] * _weights(weight, c, V)
    if softcap is not None:
        grad *= 1.0 - (x / softcap) * (x / softcap)
    return tl.where(live[:, None], grad, 0.0)


@triton.jit
def _read(x_row, c, mask, softcap, EVICT: tl.constexpr = ""):
    """A tile [rows, block]: the logits as stored, and after softcap; -inf where masked."""
    x = tl.load(x_row[:, None] + c, mask, other=-float("inf"), eviction_policy=EVICT).to(tl.float32)
    if softcap is None:
        return x, x
    else:
        return x, tl.where(mask, _capped(x, softcap), -float("inf"))


@triton.jit(
    do_not_specialize=["rows", "inner", "logits_outer", "logits_inner", "grad_outer", "grad_inner"],
    do_not_specialize_on_alignment=["targets", "label_smoothing", "z_loss", "normalizer", "grad_scale", "recorded"],
)
def batch(
    logits,
    targets,
    weight,  # [V]
    label_smoothing,
    z_loss,
    softcap,
    normalizer,  # None: the rows' weights added up, by `count` into counted, else here
    counted,
    recorded,  # a loss that other code computed, to be metered instead
    grad_scale,
    losses,  # [rows], written
    loss,  # [], written
    kept,  # [2 rows + 1], written: maximum and sum of exponentials of each row; the rows' weights added up
    grad,  # like logits, written; may be the logits
    sums,  # of the meter
    counts,
    partials,  # [COLUMNS, programs] float64
    ticket,
    rows: tl.int64,
    inner,
    logits_outer,
    logits_inner,
    grad_outer,
    grad_inner,
    V: tl.constexpr,
    UNIT: tl.constexpr,
    IGNORE: tl.constexpr,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,  # of partials: those of the meter's counts
    PADDED: tl.constexpr,  # to a power of 2
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    COUNT_PROGRAMS: tl.constexpr,
):
    """Everything a batch needs: row losses, gradient, counts, and by the program that ends last, their sums."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c, column = tl.arange(0, BLOCK)[None, :], tl.arange(0, PADDED)
    limit = tl.zeros([PADDED], tl.int32)  # ranks that are correct
    for i in tl.static_range(len(TOPK)):
        limit = tl.where(column == COLUMNS - len(TOPK) + i, TOPK[i], limit)
    if grad is not None:
        if normalizer is not None:
            denominator = _number(normalizer)
        elif counted is not None:
            denominator = tl.sum(tl.load(counted + tl.arange(0, COUNT_PROGRAMS))).to(tl.float32)
        else:
            denominator = _weight_sum(targets, weight, rows, 0, 1, V, IGNORE, COUNT_BLOCK).to(tl.float32)
        denominator = tl.full([ROWS], denominator, tl.float32)
        scale = _number(grad_scale) / denominator
    loss_lanes, weight_lanes = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    count_lanes = tl.zeros([ROWS, PADDED], tl.int32)

    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES if RESIDENT else 1):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        target, valid, ignored, bad = _classify(targets, row, rows, V, IGNORE)
        x_row = logits + _offset(row, inner, logits_outer, logits_inner, UNIT)
        target_logit = tl.load(x_row + target, valid, other=0.0).to(tl.float32)
        target_x = _capped(target_logit, softcap)
        rank, weight_sum, smooth = tl.zeros([ROWS], tl.int32), tl.full([ROWS], V, tl.float32), target_x
        if RESIDENT:
            mask = valid[:, None] & (c < V)
            stored, x = _read(x_row, c, mask, softcap)
            if counts is not None:
                earlier = (stored == target_logit[:, None]) & (c < target[:, None])
                rank = tl.sum(((stored > target_logit[:, None]) | earlier).to(tl.int32), 1)
            row_max = tl.max(x, 1)
            p = tl.exp(x - row_max[:, None])
            row_sum = tl.sum(p, 1)
            if label_smoothing is not None:
                w = _weights(weight, c, V)
                if weight is not None:
                    weight_sum = tl.sum(w + tl.zeros([ROWS, BLOCK], tl.float32), 1)
                smooth = tl.sum(tl.where(mask, w * (x - row_max[:, None]), 0.0), 1)
        else:
            # A maximum and a sum a lane, from below all logits, so that no lane subtracts -inf from -inf.
            lane_max, lane_sum = tl.full([ROWS, BLOCK], LOWEST, tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
            lane_rank, lane_weight = tl.zeros([ROWS, BLOCK], tl.int32), tl.zeros([ROWS, BLOCK], tl.float32)
            lane_smooth = tl.zeros([ROWS, BLOCK], tl.float32)
            # The maximum is not known yet, and sums of large logits would cancel.
            origin = tl.where(tl.abs(target_x) < float("inf"), target_x, 0.0)[:, None]
            blocks = tl.where(tl.max(valid.to(tl.int32), 0) > 0, tl.cdiv(V, BLOCK), 0)
            for block in tl.range(0, blocks, num_stages=STAGES):
                at = block * BLOCK + c
                stored, x = _read(x_row, at, at < V, softcap)
                if counts is not None:
                    earlier = (stored == target_logit[:, None]) & (at < target[:, None])
                    lane_rank += ((stored > target_logit[:, None]) | earlier).to(tl.int32)
                if label_smoothing is not None:
                    w = _weights(weight, at, V)
                    if weight is not None:
                        lane_weight += w
                    lane_smooth += tl.where(at < V, w * (x - origin), 0.0)
                difference = x - lane_max
                p = tl.exp(-tl.abs(difference))
                lane_sum = tl.where(difference > 0, lane_sum * p + 1.0, lane_sum + p)
                lane_max = tl.maximum(lane_max, x)
            row_max = tl.max(lane_max, 1)
            row_sum = tl.sum(lane_sum * tl.exp(lane_max - row_max[:, None]), 1)
            row_sum = tl.where(row_sum == 0, float("nan"), row_sum)  # nothing but -inf
            rank = tl.sum(lane_rank, 1)
            if weight is not None:
                weight_sum = tl.sum(lane_weight, 1)
            smooth = tl.sum(lane_smooth, 1) + weight_sum * (tl.max(origin, 1) - row_max)

        row_weight = tl.full([ROWS], 1.0, tl.float32)
        if weight is not None:
            row_weight = tl.load(weight + target, valid, other=0.0).to(tl.float32)
        log_sum = tl.log(row_sum)  # NaN exactly where the row is non-finite
        row_loss = row_weight * (log_sum - (target_x - row_max))
        if label_smoothing is not None:
            e = _number(label_smoothing)
            row_loss *= 1.0 - e
            row_loss += tl.where(e > 0, e / V * (weight_sum * log_sum - smooth), 0.0)
        if z_loss is not None:
            row_loss += _number(z_loss) * (row_max + log_sum) * (row_max + log_sum)
        row_loss = tl.where(valid, row_loss, 0.0)
        loss_lanes += row_loss.to(tl.float64)
        weight_lanes += tl.where(valid, row_weight, 0.0).to(tl.float64)
        finite = row_sum == row_sum
        flags = (valid & finite)[:, None] & (rank[:, None] < limit[None, :])
        flags |= (valid[:, None] & (column == 0)) | (ignored[:, None] & (column == 1))
        flags |= ((valid & ~finite)[:, None] & (column == 2)) | (bad[:, None] & (column == 3))
        count_lanes += flags.to(tl.int32)

        if losses is not None:
            if counts is None:
                row_loss = tl.where(bad, float("nan"), row_loss)  # no meter will tell
            tl.store(losses + row, row_loss, row < rows)
        if kept is not None:
            tl.store(kept + row, row_max, row < rows)
            tl.store(kept + rows + row, row_sum, row < rows)
        if grad is not None:
            of_softmax, at_target, everywhere = _coefficients(
                scale, row_weight, weight_sum, row_max + log_sum, label_smoothing, z_loss, V
            )
            of_softmax /= row_sum
            live = valid & (denominator != 0)
            grad_row = grad + _offset(row, inner, grad_outer, grad_inner, UNIT)
            if RESIDENT:
                g = _gradient(
                    p, x, c, target, live, of_softmax, at_target, everywhere, weight, label_smoothing, softcap, V
                )
                tl.store(grad_row[:, None] + c, g, (row < rows)[:, None] & (c < V))
            else:
                for block in tl.range(0, tl.cdiv(V, BLOCK), num_stages=STAGES):
                    at = (tl.cdiv(V, BLOCK) - 1 - block) * BLOCK + c
                    _, x = _read(x_row, at, live[:, None] & (at < V), softcap, "evict_first")
                    p = tl.exp(x - row_max[:, None])
                    g = _gradient(
                        p, x, at, target, live, of_softmax, at_target, everywhere, weight, label_smoothing, softcap, V
                    )
                    tl.store(grad_row[:, None] + at, g, at < V, cache_modifier=".cs")

    if partials is not None:
        # Columns as the meter's counts; `batches` and `batches_with_valid` need no sum and make room for two.
        sum_of = tl.where(column == 4, tl.sum(loss_lanes), tl.sum(count_lanes, 0).to(tl.float64))
        sum_of = tl.where(column == 5, tl.sum(weight_lanes), sum_of)
        tl.store(partials + column * programs + program, sum_of, column < COLUMNS)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(ticket, 1) == programs - 1:
            _finish(loss, kept, sums, counts, partials, ticket, normalizer, recorded, rows, COLUMNS, PADDED)


@triton.jit
def _finish(
    loss, kept, sums, counts, partials, ticket, normalizer, recorded, rows, COLUMNS: tl.constexpr, PADDED: tl.constexpr
):
    """The last program adds up what all left, in the order of the programs."""
    tl.store(ticket, 0)
    programs, column, lane = tl.num_programs(0), tl.arange(0, PADDED), tl.arange(0, 256)
    lanes = tl.zeros([PADDED, 256], tl.float64)
    for start in tl.range(0, programs, 256):
        program = start + lane
        mask = (column < COLUMNS)[:, None] & (program < programs)[None, :]
        # Past the first-level cache, which does not see what other multiprocessors store.
        at = partials + column[:, None] * programs + program[None, :]
        lanes += tl.load(at, mask, other=0.0, cache_modifier=".cg")
    total = tl.sum(lanes, 1)
    valid, bad = tl.sum(tl.where(column == 0, total, 0.0)), tl.sum(tl.where(column == 3, total, 0.0))
    loss_sum, weight_sum = tl.sum(tl.where(column == 4, total, 0.0)), tl.sum(tl.where(column == 5, total, 0.0))
    if recorded is not None:
        mean = tl.load(recorded).to(tl.float64)
        loss_sum, weight_sum = tl.where(valid > 0, mean * valid, 0.0), valid
    if counts is not None:
        added = tl.where(column == 4, 1.0, tl.where(column == 5, (valid > 0).to(tl.float64), total))
        mask = column < COLUMNS
        tl.store(counts + column, tl.load(counts + column, mask) + added.to(tl.int64), mask)
        tl.store(sums, tl.load(sums) + loss_sum)
        tl.store(sums + 1, tl.load(sums + 1) + weight_sum)
        tl.store(sums + 2, tl.load(sums + 2) + tl.where(valid > 0, loss_sum / weight_sum, 0.0))
    if kept is not None:
        tl.store(kept + 2 * rows, weight_sum.to(tl.float32))
    if loss is not None:
        denominator = weight_sum
        if normalizer is not None:
            denominator = _number(normalizer).to(tl.float64)
        unknown = denominator == 0
        if counts is None:
            unknown |= bad > 0
        tl.store(loss, tl.where(unknown, float("nan"), loss_sum / denominator).to(tl.float32))


@triton.jit(
    do_not_specialize=["rows", "inner", "logits_outer", "logits_inner"],
    do_not_specialize_on_alignment=["grad_output", "targets", "label_smoothing", "z_loss", "normalizer"],
)
def backward(
    grad_output,  # [] or, with PER_ROW, [rows]
    logits,
    targets,
    weight,
    weight_total,  # [], its sum, where label_smoothing needs it
    label_smoothing,
    z_loss,
    softcap,
    normalizer,  # None: what `batch` kept
    kept,
    grad,  # [rows, V], written
    rows: tl.int64,
    inner,
    logits_outer,
    logits_inner,
    V: tl.constexpr,
    UNIT: tl.constexpr,
    IGNORE: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient from what `batch` kept of each row; one tile a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    target, valid, _, _ = _classify(targets, row, rows, V, IGNORE)
    x_row = logits + _offset(row, inner, logits_outer, logits_inner, UNIT)
    row_max, row_sum = tl.load(kept + row, valid, other=0.0), tl.load(kept + rows + row, valid, other=1.0)
    row_weight, weight_sum = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], V, tl.float32)
    if weight is not None:
        row_weight = tl.load(weight + target, valid, other=0.0).to(tl.float32)
    if weight_total is not None:
        weight_sum += _number(weight_total) - V
    if normalizer is None:
        denominator = tl.load(kept + 2 * rows)
    else:
        denominator = _number(normalizer)
    denominator = tl.full([ROWS], denominator, tl.float32)
    if PER_ROW:
        scale = tl.load(grad_output + row, valid, other=0.0).to(tl.float32) / denominator
    else:
        scale = _number(grad_output) / denominator
    live = valid & (denominator != 0)
    of_softmax, at_target, everywhere = _coefficients(
        scale, row_weight, weight_sum, row_max + tl.log(row_sum), label_smoothing, z_loss, V
    )
    of_softmax /= row_sum
    _, x = _read(x_row, c, live[:, None] & (c < V), softcap)
    p = tl.exp(x - row_max[:, None])
    g = _gradient(p, x, c, target, live, of_softmax, at_target, everywhere, weight, label_smoothing, softcap, V)
    tl.store(grad + row[:, None] * V + c, g, (row < rows)[:, None] & (c < V))
