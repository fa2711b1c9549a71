"""The definition of log-probabilities of targets and of entropies, in eager torch on any device.

A backend is a module with `forward` and `backward` of this signature. Both write to memory that is
given, trust their arguments, which the public functions have checked, and never wait for the
device. Arithmetic is float32, float64 for float64 logits. With z = (logit - top) / temperature,
top the largest logit of a row, and S the sum of exp(z), the log-probability of a class is
z - log S, and the entropy is log S - sum z exp(z) / S. A row with NaN or inf, or with nothing but
-inf, gives NaN, as does a target outside [0, V), whose gradient is 0; on the CPU such targets have
been refused before.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels.ops.cross_entropy.reference import (
    LOWEST_EXPONENT,
    SMALLEST,
    classify,
)

_CPU_BYTES = 1 << 20  # of float32 logits at a time, which stay in the cache then
_GPU_BYTES = 64 << 20
_LOWEST = -1e4  # like -inf its exponential is 0, but its product with 0 is 0 and not NaN


class Options(NamedTuple):
    """temperature: in [2**-100, 2**100]. Rows with target ignore_index give 0."""

    temperature: float
    ignore_index: int
    instruction_set: str = "auto"  # for `cpp`


@torch.no_grad()
def forward(
    logits: Tensor,  # [..., V], N rows
    targets: Tensor,  # [...]
    options: Options,
    logprobs: Tensor,  # [N]
    entropy: Tensor | None,  # [N]; None where it is not wanted
    row_sums: Tensor | None,  # [N, 2]: top and S for `backward`; None where none follows
) -> None:
    flat = logits.reshape(-1, logits.shape[-1])
    rows = classify(targets.reshape(-1), flat.shape[1], options.ignore_index)
    for part in _parts(flat):
        top = _wide(flat[part]).amax(-1)
        z = _exponents(flat[part], top, options)
        total = z.exp().sum(-1)
        log_total = total.log()
        results = [(logprobs, z.gather(-1, rows.target[part, None])[:, 0] - log_total)]
        if entropy is not None:
            z.clamp_(min=_LOWEST)
            results.append((entropy, log_total - (z.exp() * z).sum(-1) / total))
        for out, values in results:
            values = torch.where(rows.ignored[part], 0.0, values)
            out[part] = torch.where(rows.bad[part], torch.nan, values)
        if row_sums is not None:
            row_sums[part] = torch.stack([top, total], -1)


@torch.no_grad()
def backward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    entropy: Tensor | None,  # as `forward` wrote it, and so is row_sums
    row_sums: Tensor,
    grad_logprobs: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    out: Tensor,  # contiguous, like the logits; may be the logits
) -> None:
    """The gradient of the logits. With p the softmax and H the entropy, the gradient of the
    log-probability is (1[target] - p) / temperature, and that of the entropy is -p (log p + H) /
    temperature."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat_out = out.view(flat.shape)
    rows = classify(targets.reshape(-1), flat.shape[1], options.ignore_index)
    for part in _parts(flat):
        top, total = row_sums[part].unbind(-1)
        z = _exponents(flat[part], top, options)
        flushes = z.dtype == torch.float32
        nothing = (z <= LOWEST_EXPONENT) & total.isfinite()[:, None]
        z.clamp_(min=_LOWEST)
        p = z.exp().div_(total[:, None])
        if flushes:
            p.masked_fill_(nothing, 0.0)
        of_logprobs = grad_logprobs[part, None] / options.temperature
        factor = of_logprobs
        if entropy is not None and grad_entropy is not None:
            of_entropy = grad_entropy[part, None] / options.temperature
            log_p_and_entropy = z.add_((entropy[part] - total.log())[:, None])
            factor = log_p_and_entropy.mul_(of_entropy).add_(of_logprobs)
        grad = p.mul_(factor).neg_()
        grad.scatter_add_(-1, rows.target[part, None], of_logprobs)
        if flushes:
            grad.masked_fill_(grad.abs() < SMALLEST, 0.0)
        flat_out[part] = grad.masked_fill_(~rows.valid[part, None], 0.0)


def _parts(flat: Tensor) -> Iterator[slice]:
    """A few rows at a time, so that nothing else of the size of the logits exists."""
    most = _CPU_BYTES if flat.is_cpu else _GPU_BYTES
    size = max(1, most // (4 * flat.shape[1]))
    return (slice(start, start + size) for start in range(0, len(flat), size))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _exponents(logits: Tensor, top: Tensor, options: Options) -> Tensor:
    """z [n, V], in new memory. The maximum goes first, so that a large offset costs no
    precision."""
    return (_wide(logits) - top[:, None]).div_(options.temperature)
