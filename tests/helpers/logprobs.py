"""Inputs of the tests of log-probabilities, and the truth about them."""

import torch
from torch import Tensor


def truth(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    categorical = torch.distributions.Categorical(
        logits=logits.double() / temperature, validate_args=False
    )
    valid = targets != ignored
    logprobs = categorical.log_prob(torch.where(valid, targets, 0).long())
    return torch.where(valid, logprobs, 0.0), torch.where(valid, categorical.entropy(), 0.0)


def inputs(
    *shape: int, classes: int = 33, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*shape, classes, generator=generator) * 3).to(dtype).requires_grad_()
    targets = torch.randint(classes, shape, generator=generator)
    targets.view(-1)[1::4] = -100
    return logits, targets


def weighted(logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
    """A sum with another factor for each row."""
    factor = torch.linspace(-1.0, 2.0, logprobs.numel()).view(logprobs.shape)
    total = (factor * logprobs).sum()
    return total if entropy is None else total + ((factor + 0.5) * entropy).sum()
