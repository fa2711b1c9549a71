"""The Triton kernels of token_logprobs; `triton` launches them. Importing this needs Triton.

An argument that is None is a constant to the compiler, and what belongs to it is left out.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
LOWEST_EXPONENT = tl.constexpr(-86.0)  # as in `reference` of cross entropy
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # of the normal float32 numbers
STAGES = tl.constexpr(4)  # pieces of a row that are being loaded at a time
NOT_SPECIALIZED = ["inner", "inverse_temperature"]


@triton.jit
def _bounded(z):
    """The exponent, but at least LOWEST_EXPONENT, because 0 times -inf would be NaN; NaN stays."""
    return tl.where(z <= LOWEST_EXPONENT, LOWEST_EXPONENT, z)


@triton.jit
def _exp(z):
    return tl.where(z <= LOWEST_EXPONENT, 0.0, tl.exp(z))


@triton.jit
def _open(logits, targets, inner, outer_stride, inner_stride, V, IGNORE: tl.constexpr):
    """The row of this program, where its logits begin, and its target; whether that is valid."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + (row // inner * outer_stride + row % inner * inner_stride)
    target = tl.load(targets + row).to(tl.int64)
    valid = (target >= 0) & (target < V) & (target != IGNORE)
    return row, start, target, valid


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def logprobs_of_rows(
    logits,
    targets,
    logprobs,  # [N], written, and so are the next two
    entropy,  # [N]
    row_sums,  # [N, 2]
    inverse_temperature,
    inner,
    outer_stride,
    inner_stride,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start, target, valid = _open(logits, targets, inner, outer_stride, inner_stride, V, IGNORE)
    # Each lane has a maximum and sums. The maximum starts below all logits, because a lane must not
    # subtract -inf from -inf.
    lane_top = tl.full([BLOCK], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_weighted = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(0, tl.cdiv(V, BLOCK) * valid.to(tl.int32), num_stages=STAGES):
        c = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start + c, c < V, other=-float("inf")).to(tl.float32)
        drop = _bounded(-tl.abs(x - lane_top) * inverse_temperature)
        e = _exp(drop)
        higher = x > lane_top
        if entropy is not None:
            lane_weighted = tl.where(
                higher, e * (lane_weighted + drop * lane_sum), lane_weighted + e * drop
            )
        lane_sum = tl.where(higher, lane_sum * e + 1.0, lane_sum + e)
        lane_top = tl.maximum(lane_top, x)
    top = tl.max(lane_top, 0)
    drop = _bounded((lane_top - top) * inverse_temperature)
    factor = _exp(drop)
    total = tl.sum(lane_sum * factor, 0)
    total = tl.where(total == 0, float("nan"), total)  # nothing but -inf
    log_total = tl.log(total)  # NaN exactly where the row is not finite
    target_logit = tl.load(start + target, valid, other=0.0).to(tl.float32)
    value = (target_logit - top) * inverse_temperature - log_total
    not_valid = tl.where(target == IGNORE, 0.0, float("nan"))
    tl.store(logprobs + row, tl.where(valid, tl.where(total == total, value, total), not_valid))
    if entropy is not None:
        weighted = tl.sum(factor * (lane_weighted + drop * lane_sum), 0)
        value = log_total - weighted / total
        tl.store(entropy + row, tl.where(valid, value, not_valid))
    if row_sums is not None:
        tl.store(row_sums + 2 * row, top)
        tl.store(row_sums + 2 * row + 1, total)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gradients_of_rows(
    logits,
    targets,
    entropy,  # [N]
    row_sums,  # [N, 2]
    grad_logprobs,  # [N]
    grad_entropy,  # [N]
    grad,  # [N, V], written; may be the logits
    inverse_temperature,
    inner,
    outer_stride,
    inner_stride,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start, target, valid = _open(logits, targets, inner, outer_stride, inner_stride, V, IGNORE)
    top = tl.load(row_sums + 2 * row)
    total = tl.load(row_sums + 2 * row + 1)
    of_logprob = tl.load(grad_logprobs + row) * inverse_temperature
    constant = of_logprob
    if grad_entropy is not None:
        of_entropy = tl.load(grad_entropy + row) * inverse_temperature
        constant += of_entropy * (tl.load(entropy + row) - tl.log(total))
    for block in tl.range(0, tl.cdiv(V, BLOCK), num_stages=STAGES):
        c = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start + c, c < tl.where(valid, V, 0), other=0.0).to(tl.float32)
        z = _bounded((x - top) * inverse_temperature)
        factor = constant
        if grad_entropy is not None:
            factor = constant + of_entropy * z
        g = tl.where(c == target, of_logprob, 0.0) - _exp(z) / total * factor
        g = tl.where(tl.abs(g) < SMALLEST, 0.0, g)
        tl.store(grad + row * V + c, tl.where(valid, g, 0.0), c < V)
