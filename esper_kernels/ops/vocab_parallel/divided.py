"""Cross entropy of logits whose classes are divided among ranks, as a backend of cross entropy.

Every rank has all rows and targets, and some classes. One collective brings seven numbers per row
and rank together, from which every rank computes the same loss; where correct predictions are
counted, another one first brings the logit of each row's target. What a meter measures besides
takes a third. The gradient needs none.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.measures import add_measures
from esper_kernels.ops.cross_entropy.reference import Forward, Number, Options, RowSums
from esper_kernels.ops.vocab_parallel import cpp, triton
from esper_kernels.ops.vocab_parallel import reference as eager
from esper_kernels.ops.vocab_parallel.measures import row_measures
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
        target_logit = None
        if meter is not None:
            own = eager.at_class(logits, rows.target, self.shard).to(dtype)
            target_logit = gathered(own, self.shard.group).sum(0)  # all but one are 0
        own_sums = self.local.class_sums(logits, targets, options, target_logit, self.shard)
        sums, rank = combined(gathered(own_sums, self.shard.group), options, dtype)
        weights = reference.class_weights(options.weight, self.shard.num_classes, sums.row_max)
        result, loss_sum, weight_sum = reference.loss_of(
            sums, rows, options, weights, meter is not None
        )
        if meter is not None:
            finite = result.row_max.isfinite()
            reference.add_to_meter(meter, rows, finite, rank, loss_sum, weight_sum)
            if meter.measures:
                measured = rows.valid & finite
                found = row_measures(
                    logits, sums, measured, options.softcap, meter.measures, self.shard
                )
                add_measures(meter, rows.target, found)
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


def combined(found: Tensor, options: Options, dtype: torch.dtype) -> tuple[RowSums, Tensor]:
    """The sums over the classes of all ranks, and the rank of each target among them.

    found: [ranks, len(CLASS_SUMS), ...], `class_sums` of each rank.
    """
    maxima, sums, targets, seconds, weighted, weights, ahead = found.unbind(1)  # [ranks, ...] each
    row_max = maxima.amax(0)
    above = torch.where(maxima == -torch.inf, 0.0, maxima) - row_max  # of the origins
    row_sum = torch.where(sums == 0, 0.0, sums * above.exp()).sum(0)
    row_sum = torch.where(row_sum == 0, torch.nan, row_sum)  # nothing but -inf
    is_smooth = reference.is_on(options.label_smoothing)
    result = RowSums(
        row_max.to(dtype),
        row_sum.log().to(dtype),
        (targets.sum(0) - row_max).to(dtype),
        None if options.second is None else (seconds.sum(0) - row_max).to(dtype),
        (weighted + weights * above).sum(0).to(dtype) if is_smooth else None,
    )
    return result, ahead.sum(0)
