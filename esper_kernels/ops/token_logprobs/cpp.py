"""Log-probabilities of targets by the compiled ops of `csrc/`, on the CPU and on CUDA."""

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS
from esper_kernels.ops.token_logprobs.reference import Options


def forward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    torch.ops.esper.token_logprobs.default(
        logits,
        targets,
        options.ignore_index,
        options.temperature,
        INSTRUCTION_SETS.index(options.instruction_set),
        logprobs,
        entropy,
        row_sums,
    )


def backward(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    entropy: Tensor | None,
    row_sums: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    torch.ops.esper.token_logprobs_backward.default(
        logits,
        targets,
        options.ignore_index,
        options.temperature,
        INSTRUCTION_SETS.index(options.instruction_set),
        entropy,
        row_sums,
        grad_logprobs,
        grad_entropy,
        out,
    )
