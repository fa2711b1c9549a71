"""What a batch loses, by task type and criterion: the fused op with its options, or a criterion of
the caller's own. `step` asks; nothing here calls a model."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypedDict

import torch
from torch import Tensor, nn

from esper_kernels import Meter, cross_entropy, record_loss
from esper_train.base.names import unknown_name
from esper_train.train.config import TrainConfig

Criterion = Callable[[Tensor, Tensor], Tensor]
Divisor = Callable[[int], float | Tensor]
"""From the number of classes to what the loss of each batch of an optimizer step is divided by."""
LOGITS_DIMS = {"classification": (2, "[N, V]"), "lm": (3, "[N, T, V]")}
"""Task type to the rank and shape of its logits."""
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
IGNORED = -100
"""The `ignore_index` of the fused op, unless its options say another."""


class Options(TypedDict, total=False):
    """The options of the fused op that a criterion decides."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str


def criterion_options(criterion: Criterion | None) -> Options | None:
    """The options of the fused op that do what the criterion does; None where it cannot.

    Only an `nn.CrossEntropyLoss` itself is read: a subclass, hooks or a replaced `forward` may
    compute something else.
    """
    if criterion is None:
        return {}
    if type(criterion) is not nn.CrossEntropyLoss or _is_customised(criterion):
        return None
    if criterion.reduction == "none":
        raise ValueError(
            "expected a criterion with reduction 'mean' or 'sum', got 'none': a step needs one loss"
        )
    return {
        "weight": criterion.weight,
        "ignore_index": criterion.ignore_index,
        "label_smoothing": criterion.label_smoothing,
        "reduction": criterion.reduction,
    }


def _is_customised(module: nn.Module) -> bool:
    """Whether calling the module does more than the `forward` of its class."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" in vars(module) or any(hooks)


class Loss:
    """The loss of a task type.

    Raises `ValueError` for an unknown task type, an `nn.CrossEntropyLoss` that does not reduce to
    one number, or another criterion where `config.capture` asks for CUDA graphs.
    """

    def __init__(self, task_type: str, config: TrainConfig, criterion: Criterion | None) -> None:
        if task_type not in LOGITS_DIMS:
            raise unknown_name("task type", task_type, LOGITS_DIMS)
        options = criterion_options(criterion)
        if config.capture and options is None:
            raise ValueError(
                "train.capture takes no criterion but nn.CrossEntropyLoss, since the Python code "
                f"of another would run at the capture only, got {criterion!r}; leave train.capture "
                "out"
            )
        self.task_type = task_type
        self.criterion = criterion
        self.own = criterion if options is None else None
        """The caller's criterion where the fused op cannot do what it does."""
        self.options: Options = options or {}
        self._config = config
        self._dims, self._shape = LOGITS_DIMS[task_type]
        self._masks = config.on_bad_numbers != "stop" and self.own is None

    def check(self, logits: Tensor) -> None:
        """`ValueError` for logits that are not of the shape of the task type."""
        if logits.dim() != self._dims:
            raise ValueError(
                f"task type {self.task_type!r} expects logits {self._shape}, got "
                f"{tuple(logits.shape)} from the model"
            )

    def record(self, logits: Tensor, targets: Tensor, meter: Meter) -> None:
        """Loss and counts of a batch, without a gradient, into the meter."""
        targets = self.within(targets, logits.shape[-1], meter)
        if self.own is None:
            cross_entropy(logits, targets, meter=meter, config=self._config.kernel, **self.options)
        else:
            record_loss(self.own(logits, targets), logits, targets, meter)

    def within(self, targets: Tensor, classes: int, meter: Meter | None) -> Tensor:
        """The targets, those outside the classes ignored and counted: the op does so itself on
        other devices, but raises on the CPU."""
        if not self._masks or not targets.is_cpu or targets.dtype not in TARGET_DTYPES:
            return targets  # the op raises for targets of another dtype
        ignored = self.options.get("ignore_index", IGNORED)
        bad = ((targets < 0) | (targets >= classes)) & (targets != ignored)
        if meter is not None:
            counts = meter.on_device()
            counts["bad_targets"] += bad.sum()
            counts["ignored"] -= bad.sum()  # the op is about to add them
        return targets.long().masked_fill(bad, ignored)

    def divisor(self, targets: Sequence[Tensor]) -> Divisor | None:
        """A common divisor of the losses of these batches, so that their gradients add up to the
        gradient of one large batch.

        Called with the number of classes, it gives the weight of all valid rows, on their device:
        rows that are not ignored and whose target is a class. For a criterion other than cross
        entropy it gives the number of batches. None for sums. A single batch needs no divisor.
        """
        if self.options.get("reduction") == "sum":
            return None
        if self.own is not None:
            return lambda classes: float(len(targets))
        weight = self.options.get("weight")
        ignored = self.options.get("ignore_index", IGNORED)

        def weight_of_rows(t: Tensor, classes: int) -> Tensor:
            t = t.long()  # -100 is another number in uint8
            valid = (t != ignored) & (t >= 0) & (t < classes)
            if weight is None:
                return valid.sum()
            return torch.where(valid, weight[t.clamp(0, classes - 1)], 0).sum()

        @cache
        def total(classes: int) -> Tensor:
            return torch.stack([weight_of_rows(t, classes) for t in targets]).sum()

        return total
