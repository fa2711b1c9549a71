"""The definition of log-probabilities of targets and of entropies, in eager torch on any device."""

import torch
from torch import Tensor

_LOWEST = -1e4  # its exponential is 0, and 0 times it is 0, which it is not for -inf


def forward(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """logits [n, V], targets [n] in [0, V); log-probabilities and entropies [n], float32 (float64
    for float64 logits)."""
    x, log_sum = _shifted(logits, temperature)
    logprobs = x.gather(-1, targets[:, None])[:, 0] - log_sum
    if not entropy:
        return logprobs, None
    x.clamp_(min=_LOWEST)
    return logprobs, log_sum - (x * (x - log_sum[:, None]).exp_()).sum(-1)


def backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    grad_logprobs: Tensor,  # [n]
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient of the logits [n, V], in their dtype: with p = softmax(logits / temperature) and
    H the entropy, that of the log-probability is (1[target] - p) / temperature, and that of the
    entropy is -p (log p + H) / temperature."""
    x, log_sum = _shifted(logits, temperature)
    x.clamp_(min=_LOWEST).sub_(log_sum[:, None])  # log p
    p = x.exp()
    if grad_entropy is None:
        grad = p.mul_(-grad_logprobs[:, None])
    else:
        entropy = -(x * p).sum(-1, keepdim=True)
        factor = x.add_(entropy).mul_(grad_entropy[:, None]).add_(grad_logprobs[:, None])
        grad = p.mul_(factor).neg_()
    grad.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
    return grad.div_(temperature).to(logits.dtype)


def _shifted(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """x = logits / temperature less the largest of each row, in new memory, and the logarithm of
    the sum of exp(x): apart, so that a large offset costs no precision."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x / temperature
    x.sub_(x.amax(-1, keepdim=True))
    return x, x.exp().sum(-1).log()
