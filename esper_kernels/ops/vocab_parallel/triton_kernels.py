"""The Triton kernels of divided classes; `triton` launches them, one program per row. Importing
this needs Triton.

An argument that is None is a constant to the compiler, and what belongs to it is left out.

Long functions: one line for each argument of a kernel.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from esper_kernels.ops.cross_entropy.triton_kernels import _capped, _class_weights, _exp

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
    """A sum of weight * (x - origin) after the origin has moved up by -`by`; nothing was added yet
    where the weights are 0."""
    return tl.where(weights == 0, weighted, weighted + weights * by)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_sums_of_rows(
    logits,
    targets,
    target_logits,  # [N]
    second,  # int64 [N]
    weight,  # of all classes
    sums,  # float64 [CLASS_SUMS, N], written
    softcap,
    rows,
    inner,
    outer_stride,
    inner_stride,
    first_class,
    num_classes,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHED: tl.constexpr,
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
        lane_sum = tl.where(x > lane_max, lane_sum * e + 1.0, lane_sum + e)
        lane_max = higher
    top = tl.max(lane_max, 0)
    total = tl.sum(lane_sum * tl.exp(lane_max - top), 0)
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
