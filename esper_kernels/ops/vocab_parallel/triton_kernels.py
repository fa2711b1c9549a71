"""The Triton kernels of divided classes; `triton` launches them, one program per row. Importing
this needs Triton.

An argument that is None is a constant to the compiler, and what belongs to it is left out.

Long functions: one line for each argument of a kernel.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from esper_kernels.ops.cross_entropy.triton_kernels import (
    DEEP,
    _capped,
    _class_weights,
    _exp,
    _first_largest,
    _rescaled,
    _second_largest,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # of the normal float32 numbers
STAGES = tl.constexpr(4)  # pieces of a row that are being loaded at a time
NOT_SPECIALIZED = [
    "softcap",
    "rows",
    "inner",
    "outer_stride",
    "inner_stride",
    "first_class",
    "num_classes",
]


@triton.jit
def _open(logits, targets, inner, outer_stride, inner_stride, num_classes, IGNORE: tl.constexpr):
    """The row of this program, where its logits begin, and its target; whether that is valid."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + (row // inner * outer_stride + row % inner * inner_stride)
    target = tl.load(targets + row).to(tl.int64)
    valid = (target >= 0) & (target < num_classes) & (target != IGNORE)
    return row, start, target, valid


@triton.jit
def _x_at(start, place, valid, softcap, V):
    """x of one class of the shard, 0 if it lies elsewhere."""
    here = valid & (place >= 0) & (place < V)
    x = tl.load(start + tl.where(here, place, 0), here, other=0.0).to(tl.float32)
    return tl.where(here, _capped(x, softcap), 0.0)


@triton.jit
def _moved(weighted, weights, by):
    """The sum of weight * (x - origin) after the origin has risen by -`by`. Where the weights add
    up to 0, nothing was added yet."""
    return tl.where(weights == 0, weighted, weighted + weights * by)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_sums_of_rows(
    logits,
    targets,
    target_logits,  # [N]
    second,  # int64 [N]
    weight,  # of all classes
    sums,  # float64 [CLASS_SUMS, N], or with MEASURED those of measures too, written
    softcap,
    rows: tl.int64,
    inner,
    outer_stride,
    inner_stride,
    first_class,
    num_classes,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    MEASURED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start, target, valid = _open(
        logits, targets, inner, outer_stride, inner_stride, num_classes, IGNORE
    )
    if target_logits is not None:
        target_logit = tl.load(target_logits + row)
    # Each lane has a maximum and sums. The maximum starts below all logits, because a lane must not
    # subtract -inf from -inf.
    lane_max = tl.full([BLOCK], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_weighted = tl.zeros([BLOCK], tl.float32)
    lane_weights = tl.zeros([BLOCK], tl.float32)
    lane_ahead = tl.zeros([BLOCK], tl.int32)
    if MEASURED:
        lane_largest = tl.full([BLOCK], -float("inf"), tl.float32)  # as stored
        lane_place = tl.arange(0, BLOCK)  # where it was first
        lane_second = tl.full([BLOCK], -float("inf"), tl.float32)
        lane_squares = tl.zeros([BLOCK], tl.float32)
        lane_products = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(0, tl.cdiv(V, BLOCK) * valid.to(tl.int32), num_stages=STAGES):
        c = block * BLOCK + tl.arange(0, BLOCK)
        stored = tl.load(start + c, c < V, other=-float("inf")).to(tl.float32)
        x = stored
        if softcap is not None:
            x = tl.where(c < V, _capped(stored, softcap), -float("inf"))
        higher = tl.maximum(lane_max, x)
        if SMOOTHED:
            w = tl.where(c < V, _class_weights(weight, first_class + c, num_classes), 0.0)
            lane_weighted = _moved(lane_weighted, lane_weights, lane_max - higher)
            lane_weighted += tl.where(c < V, w * (x - higher), 0.0)
            lane_weights += w
        if target_logits is not None:
            earlier = (stored == target_logit) & (first_class + c < target)
            lane_ahead += ((stored > target_logit) | earlier).to(tl.int32)
        e = tl.exp(-tl.abs(x - lane_max))
        rises = x > lane_max
        if MEASURED:
            factor = tl.where(rises, e, 1.0)
            lane_squares, lane_products = _rescaled(
                lane_squares, lane_products, lane_sum, factor, lane_max - higher, ENTROPY
            )
            own = tl.where(rises, 1.0, e)
            lane_squares += own * own
            if ENTROPY:
                lane_products += own * tl.maximum(x - higher, DEEP)
                lane_second = tl.maximum(lane_second, tl.minimum(lane_largest, stored))
            lane_place = tl.where(stored > lane_largest, c, lane_place)
            lane_largest = tl.maximum(lane_largest, stored)
        lane_sum = tl.where(rises, lane_sum * e + 1.0, lane_sum + e)
        lane_max = higher
    top = tl.max(lane_max, 0)
    factor = tl.exp(lane_max - top)
    total = tl.sum(lane_sum * factor, 0)
    maximum = tl.where(total == total, top, float("nan"))
    out = sums + row
    tl.store(out, tl.where(total == 0, -float("inf"), maximum))  # nothing but -inf
    tl.store(out + rows, total)
    tl.store(out + 2 * rows, _x_at(start, target - first_class, valid, softcap, V))
    second_x = 0.0
    if second is not None:
        second_x = _x_at(start, tl.load(second + row) - first_class, valid, softcap, V)
    tl.store(out + 3 * rows, second_x)
    tl.store(out + 4 * rows, tl.sum(_moved(lane_weighted, lane_weights, lane_max - top), 0))
    tl.store(out + 5 * rows, tl.sum(lane_weights, 0))
    tl.store(out + 6 * rows, tl.sum(lane_ahead, 0))
    if MEASURED:
        largest = lane_largest[None, :]
        row_largest = tl.max(largest, 1)
        place = _first_largest(largest, lane_place[None, :], V)
        squares, products = _rescaled(
            lane_squares, lane_products, lane_sum, factor, lane_max - top, ENTROPY
        )
        tl.store(out + 7 * rows, tl.max(row_largest, 0))
        tl.store(out + 8 * rows, first_class + tl.max(place, 0))
        tl.store(out + 9 * rows, tl.sum(squares, 0))
        tl.store(out + 10 * rows, tl.sum(products, 0))
        runner_up = tl.max(lane_second, 0)
        if ENTROPY:
            runner_up = tl.maximum(runner_up, tl.max(_second_largest(largest, row_largest), 0))
            if V > 1:  # without another logit it stays -inf
                runner_up = _capped(runner_up, softcap)
        tl.store(out + 11 * rows, runner_up)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gradients_of_rows(
    logits,
    targets,
    row_max,  # [N], and so are those below
    row_log_sum,
    of_softmax,
    at_target,
    at_second,
    everywhere,
    second,  # int64 [N]
    weight,  # of all classes
    grad,  # [N, V], written; may be the logits
    softcap,
    inner,
    outer_stride,
    inner_stride,
    first_class,
    num_classes,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start, target, valid = _open(
        logits, targets, inner, outer_stride, inner_stride, num_classes, IGNORE
    )
    top = tl.load(row_max + row)
    log_sum = tl.load(row_log_sum + row)
    # NaN for rows that are not finite
    factor = tl.load(of_softmax + row) * tl.exp(-log_sum) + (top - top)
    target_share = tl.load(at_target + row)
    for block in tl.range(0, tl.cdiv(V, BLOCK), num_stages=STAGES):
        c = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start + c, c < tl.where(valid, V, 0), other=0.0).to(tl.float32)
        x = _capped(x, softcap)
        class_of_lane = first_class + c
        g = _exp(x - top) * factor - tl.where(class_of_lane == target, target_share, 0.0)
        if second is not None:
            is_second = class_of_lane == tl.load(second + row)
            g -= tl.where(is_second, tl.load(at_second + row), 0.0)
        if everywhere is not None:
            w = _class_weights(weight, class_of_lane, num_classes)
            g -= tl.load(everywhere + row) * w
        if softcap is not None:
            g *= 1.0 - (x / softcap) * (x / softcap)
        g = tl.where(tl.abs(g) < SMALLEST, 0.0, g)
        tl.store(grad + row * V + c, tl.where(valid, g, 0.0), c < V)
