"""Cross entropy of logits whose classes are divided among ranks, as a backend of cross entropy.

Every rank has all rows and targets, and some classes. One collective brings seven numbers per row
and rank together, from which every rank computes the same loss; twelve where a meter measures more.
Where correct predictions are counted, another one first brings the logit of each row's target. The
gradient needs none.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.measures import add_measures
from esper_kernels.ops.cross_entropy.reference import Forward, Number, Options
from esper_kernels.ops.vocab_parallel import cpp, triton
from esper_kernels.ops.vocab_parallel import reference as eager
from esper_kernels.ops.vocab_parallel.combine import measures_of, sums_of
from esper_kernels.ops.vocab_parallel.shard import ClassShard, gathered

_MODULES = {"eager": eager, "cpp": cpp, "triton": triton}


@dataclass(frozen=True)
class DividedClasses:
    """The functions of a backend of cross entropy but `record`, for logits [..., V of this rank].

    Targets are in [0, shard.num_classes), and options.weight is that of all classes. The loss, and
    what is added to a meter, are those of all classes, on every rank.
    """

    local: ModuleType  # computes what one rank does by itself
    shard: ClassShard

    @staticmethod
    def served_by(backend: str, shard: ClassShard) -> "DividedClasses":
        return DividedClasses(_MODULES[backend], shard)

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        options: Options,
        meter: Meter | None,
        for_backward: bool = True,
    ) -> Forward:
        rows = reference.classify(targets, self.shard.num_classes, options.ignore_index)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        target_logit = plan = None
        if meter is not None:
            plan = meter.measures
            own = eager.at_class(logits, rows.target, self.shard).to(dtype)
            target_logit = gathered(own, self.shard.group).sum(0)  # all but one are 0
        own_sums = self.local.class_sums(logits, targets, options, target_logit, plan, self.shard)
        found = gathered(own_sums, self.shard.group)  # [ranks, num_sums(plan), ...]
        sums, rank = sums_of(found, options, dtype)
        weights = reference.class_weights(options.weight, self.shard.num_classes, sums.row_max)
        result, loss_sum, weight_sum = reference.loss_of(
            sums, rows, options, weights, meter is not None
        )
        if meter is not None:
            finite = result.row_max.isfinite()
            reference.add_to_meter(meter, rows, finite, rank, loss_sum, weight_sum)
            if plan:
                measured = measures_of(found, rows.valid & finite, plan, dtype)
                add_measures(meter, rows.target, measured)
        return result

    def backward(
        self,
        grad_output: Tensor,
        logits: Tensor,
        targets: Tensor,
        row_max: Tensor,
        row_log_sum: Tensor,
        denominator: Tensor,
        options: Options,
        out: Tensor | None = None,
    ) -> Tensor:
        grad: Tensor = self.local.backward(
            grad_output,
            logits,
            targets,
            row_max,
            row_log_sum,
            denominator,
            options,
            self.shard,
            out,
        )
        return grad

    @torch.no_grad()
    def step(
        self,
        logits: Tensor,
        targets: Tensor,
        options: Options,
        meter: Meter | None,
        grad_scale: Number | None,
        out: Tensor | None,
    ) -> Tensor:
        result = self.forward(logits, targets, options, meter)
        scale = reference.first_gradient(result, grad_scale)
        return self.backward(scale, logits, targets, *result[1:], options, out)
