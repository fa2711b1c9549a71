"""One rank's part of the cross entropy of divided classes, by the compiled ops of `csrc/` on the
CPU: its logits are read once for the loss, and once for the gradient."""

import torch
from torch import Tensor

from esper_kernels.config import INSTRUCTION_SETS
from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy import cpp
from esper_kernels.ops.cross_entropy.reference import Options, is_on
from esper_kernels.ops.vocab_parallel.reference import num_sums
from esper_kernels.ops.vocab_parallel.shard import ClassShard


def class_sums(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    target_logit: Tensor | None,
    plan: MeasurePlan | None,
    shard: ClassShard,
) -> Tensor:
    sums = logits.new_empty(num_sums(plan), *targets.shape, dtype=torch.float64)
    torch.ops.esper.class_sums.default(
        logits,
        targets,
        options.weight,
        options.ignore_index,
        is_on(options.label_smoothing),
        options.softcap,
        INSTRUCTION_SETS.index(options.instruction_set),
        shard.first,
        shard.num_classes,
        target_logit,
        options.second,
        options.shares,
        plan or (),
        sums,
    )
    return sums


def backward(
    grad_output: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    denominator: Tensor,
    options: Options,
    shard: ClassShard,
    out: Tensor | None,
) -> Tensor:
    saved = torch.cat([row_max.flatten(), row_log_sum.exp().flatten(), denominator.float()[None]])
    return cpp.backward(
        grad_output.float(),
        logits,
        targets,
        saved,
        options,
        first_class=shard.first,
        num_classes=shard.num_classes,
        out=out,
    )
