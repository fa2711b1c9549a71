"""Loss and counts of a batch, by task type and criterion: the fused op with its options, torch's
own op for soft targets, or a criterion of the caller's own. `step` asks; nothing here calls a
model."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    Meter,
    cross_entropy,
    record_loss,
)
from esper_train.base.names import require_known
from esper_train.train.config import TrainConfig

Criterion = Callable[[Any, Any], Tensor]
"""A function from the model's output tensor and the targets to the mean loss, []."""
Divisor = Callable[[int], float | Tensor]
"""A function from the number of classes to the divisor of the loss of each batch of an optimizer
step."""
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
IGNORED = -100
"""The `ignore_index` of the fused op, unless its options say another."""


@dataclass(frozen=True)
class TaskType:
    """The output that a task type expects of a model."""

    shape: str
    dims: range
    class_dim: int | None
    """The dimension of the classes; None without classes, so that nothing is counted."""


TASK_TYPES: Mapping[str, TaskType] = {
    "classification": TaskType("[N, V]", range(2, 3), -1),
    "lm": TaskType("[N, T, V]", range(3, 4), -1),
    "dense": TaskType("[N, V, d, ...]", range(3, sys.maxsize), 1),
    "regression": TaskType("[N, ...]", range(1, sys.maxsize), None),
}


class Options(TypedDict, total=False):
    """The options of the fused op that a criterion decides."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    z_loss: float
    softcap: float | None


def criterion_options(criterion: Criterion | None) -> Options | None:
    """The options with which the fused op does what the criterion does; None where it cannot.

    Only an `nn.CrossEntropyLoss` or `esper_kernels.CrossEntropyLoss` itself is read: a subclass,
    hooks or a replaced `forward` may compute something else. Raises `ValueError` for one that does
    not reduce to one number, or that has a meter or config of its own.
    """
    if criterion is None:
        return {}
    if type(criterion) not in (nn.CrossEntropyLoss, CrossEntropyLoss):
        return None
    assert isinstance(criterion, nn.CrossEntropyLoss)
    if is_customised(criterion):
        return None
    if criterion.reduction == "none":
        raise ValueError(
            "expected a criterion with reduction 'mean' or 'sum', got 'none': a step needs one loss"
        )
    options: Options = {
        "weight": criterion.weight,
        "ignore_index": criterion.ignore_index,
        "label_smoothing": criterion.label_smoothing,
        "reduction": criterion.reduction,
    }
    if isinstance(criterion, CrossEntropyLoss):
        if criterion.meter is not None or criterion.config is not None:
            raise ValueError(
                "expected a CrossEntropyLoss without a meter and config, since the loop counts by "
                "its own meter, and train.kernel says what kernels run; leave them out"
            )
        options["z_loss"] = criterion.z_loss
        options["softcap"] = criterion.softcap
    return options


def refuse_linear_module(criterion: object) -> None:
    """`ValueError` for a loss with a last layer of its own, where the model's output are logits."""
    if isinstance(criterion, LinearCrossEntropyLoss):
        raise ValueError(
            "LinearCrossEntropyLoss is no criterion for logits, since it holds the last layer "
            "itself; for a loss without logits give the model features(inputs) and output_layer, "
            "and set train.linear_loss, with CrossEntropyLoss as the criterion"
        )


def is_customised(module: nn.Module) -> bool:
    """Whether calling the module does more than the `forward` of its class."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" in vars(module) or any(hooks)


class Loss:
    """The loss of a task type, and the counts that go with it.

    Raises `TypeError` for a criterion that cannot be called, and `ValueError` for an unknown task
    type, a regression without a criterion, a criterion of the caller's own where `config.capture`
    asks for CUDA graphs, a `LinearCrossEntropyLoss`, and as `criterion_options` does.
    """

    def __init__(self, task_type: str, config: TrainConfig, criterion: Criterion | None) -> None:
        require_known("task type", task_type, TASK_TYPES)
        if isinstance(criterion, type) or not (criterion is None or callable(criterion)):
            raise TypeError(
                "expected a criterion that can be called with logits and targets, got "
                f"{criterion!r}; make the object, such as nn.CrossEntropyLoss()"
            )
        task = TASK_TYPES[task_type]
        self.counts = task.class_dim is not None
        """Whether there are classes to count correct predictions of."""
        if criterion is None and not self.counts:
            raise ValueError(
                f"task type {task_type!r} needs a criterion, got None; pass one, such as "
                "nn.MSELoss()"
            )
        if config.measures.any and not self.counts:
            raise ValueError(
                f"train.measures is about classes, and task type {task_type!r} has none; leave it "
                "out"
            )
        if self.counts:
            refuse_linear_module(criterion)
        options = criterion_options(criterion) if self.counts else None
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
        self.ignored = self.options.get("ignore_index", IGNORED)
        """The target that is left out of loss and counts."""
        self.saw_soft_targets = False
        """Whether torch's own op computed the loss of a batch; the loop resets it."""
        self._config = config
        self._dims = task.dims
        self._shape = task.shape
        self._class_dim = -1 if task.class_dim is None else task.class_dim
        self.is_dense = task.class_dim == 1
        """Whether the classes are second in the model's logits, not last."""
        self.masks = config.on_bad_numbers != "stop" and self.own is None
        """Whether `within` has something to do."""

    def check(self, logits: Tensor, targets: object) -> None:
        """`ValueError` for logits that are not of the shape of the task type, `TypeError` for
        targets that are no tensor where there are classes."""
        if logits.dim() not in self._dims:
            hint = ""
            if logits.dim() < self._dims.start:
                hint = "; if the loader is a Dataset of samples, wrap it in a DataLoader"
            others = [
                f"{name!r} takes {task.shape}"
                for name, task in TASK_TYPES.items()
                if logits.dim() in task.dims and task.class_dim is not None
            ]
            others.append("'regression' takes any shape with a criterion of your own")
            raise ValueError(
                f"task type {self.task_type!r} expects logits {self._shape}, got "
                f"{tuple(logits.shape)} from the model{hint}; {', '.join(others)}, and counts "
                "nothing"
            )
        if self.counts and not isinstance(targets, Tensor):
            raise TypeError(
                f"task type {self.task_type!r} expects targets as a tensor, got a "
                f"{type(targets).__name__}; pass batch= to make one of it, or use task type "
                "'regression', which counts nothing and hands the targets to the criterion"
            )

    def is_fused(self, logits: Tensor, targets: Tensor) -> bool:
        """Whether the fused op serves the batch: torch's own op serves soft targets, one share of
        each class, of the logits' shape; a criterion of the caller's own serves everything."""
        return self.own is None and not _are_soft(logits, targets)

    def classes_last(self, logits: Tensor) -> Tensor:
        """The logits as a view [..., V], as the fused op takes them."""
        return logits.movedim(1, -1) if self.is_dense else logits

    def compute(self, logits: Tensor, targets: Any) -> Tensor:
        """The batch's loss where the fused op does not serve it, as its criterion reduces it."""
        if self.own is not None:
            return self.own(logits, targets)
        if self.options.get("z_loss") or self.options.get("softcap") is not None:
            raise ValueError(
                "soft targets are served by F.cross_entropy, which has no z_loss or softcap; pass "
                "classes as targets, or leave these out of the criterion"
            )
        self.saw_soft_targets = True
        if self.task_type == "lm":  # torch has the classes second
            logits = logits.flatten(0, 1)
            targets = targets.flatten(0, 1)
        return F.cross_entropy(
            logits,
            targets,
            weight=self.options.get("weight"),
            label_smoothing=self.options.get("label_smoothing", 0.0),
            reduction=self.options.get("reduction", "mean"),
        )

    def classes(self, logits: Tensor) -> int:
        """The number of classes."""
        return logits.shape[self._class_dim]

    def share(self, logits: Tensor) -> float:
        """The factor of the loss of `compute` before it is divided by a `divisor`."""
        return 1.0 if self.own is not None else float(self._rows(logits))

    def _rows(self, logits: Tensor) -> int:
        return logits.numel() // max(1, self.classes(logits))

    def record(self, loss: Tensor, logits: Tensor, targets: Any, meter: Meter) -> None:
        """Add a batch whose loss is that of `compute` to the meter."""
        logits = logits.detach()
        loss = loss.detach()
        if not self.counts:
            record_loss(loss, *_one_class(logits), meter)
            return
        if targets.is_floating_point() and not _are_soft(logits, targets):
            raise TypeError(
                f"task type {self.task_type!r} expects targets that are classes, or shares of the "
                f"classes of the logits' shape {tuple(logits.shape)}, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}; 'regression' takes any targets, and counts nothing"
            )
        if self.own is None and self.options.get("reduction") == "sum":
            loss = loss / max(1, self._rows(logits))
        record_loss(loss, self.classes_last(logits), self._labels(logits, targets), meter)

    def measure(self, logits: Tensor, targets: Tensor, meter: Meter) -> None:
        """Add loss and counts of a batch that the fused op serves to the meter, without a
        gradient."""
        targets = self.within(targets, self.classes(logits), meter)
        logits = self.classes_last(logits)
        cross_entropy(logits, targets, meter=meter, config=self._config.kernel, **self.options)

    def right(self, logits: Tensor, targets: Any) -> Tensor:
        """Whether each row is predicted correctly: bool [...], of the targets' shape; [0] without
        classes."""
        if not self.counts:
            return torch.zeros(0, dtype=torch.bool, device=logits.device)
        best = logits.max(self._class_dim)
        return (best.indices == self._labels(logits, targets)) & best.values.isfinite()

    def _labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The class of each row: of soft targets, that with the largest share."""
        return targets.argmax(self._class_dim) if _are_soft(logits, targets) else targets

    def within(self, targets: Tensor, classes: int, meter: Meter | None) -> Tensor:
        """The targets, those outside the classes ignored and counted: the op does so itself on
        other devices, but raises on the CPU."""
        if not self.masks or not targets.is_cpu or targets.dtype not in TARGET_DTYPES:
            return targets  # the op raises for targets of another dtype
        targets = targets.long()  # uint8 would read -100 as 156, and 300 classes as 44
        bad = ((targets < 0) | (targets >= classes)) & (targets != self.ignored)
        if meter is not None:
            counts = meter.on_device()
            counts["bad_targets"] += bad.sum()
            counts["ignored"] -= bad.sum()  # the op adds to them next
        return targets.masked_fill(bad, self.ignored)

    def divisor(self, targets: Sequence[Any]) -> Divisor | None:
        """A common divisor of the losses of these batches, so that their gradients add up to the
        gradient of one large batch.

        Called with the number of classes, it gives the weight of all valid rows, on their device:
        rows that are not ignored and whose target is a class, and 1 for each row of soft targets.
        For a criterion other than cross entropy it gives the number of batches. None for sums. A
        single batch needs no divisor.
        """
        if self.options.get("reduction") == "sum":
            return None
        if self.own is not None:
            return lambda classes: float(len(targets))
        weight = self.options.get("weight")

        def weight_of_rows(t: Tensor, classes: int) -> Tensor:
            if t.is_floating_point():
                return t.new_full((), t.numel() // classes)
            t = t.long()  # as in `within`
            valid = (t != self.ignored) & (t >= 0) & (t < classes)
            if weight is None:
                return valid.sum()
            return torch.where(valid, weight[t.clamp(0, classes - 1)], 0).sum()

        @cache
        def total(classes: int) -> Tensor:
            return torch.stack([weight_of_rows(t, classes) for t in targets]).sum()

        return total


def _are_soft(logits: Tensor, targets: Tensor) -> bool:
    """Whether the targets are shares of the classes. Floating targets of another shape are none:
    the op refuses them."""
    return targets.is_floating_point() and targets.shape == logits.shape


def _one_class(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, 1] and targets [N] that count the rows of a regression, and those that are not
    finite."""
    rows = predictions.flatten(1) if predictions.dim() > 1 else predictions[:, None]
    bad = ~rows.isfinite().all(1, keepdim=True)
    logits = torch.zeros_like(bad, dtype=torch.float32).masked_fill_(bad, torch.nan)
    return logits, torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
