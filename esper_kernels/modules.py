"""The losses as modules, with the constructors of torch's own."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import checks
from esper_kernels.config import KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import cross_entropy
from esper_kernels.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` by `esper_kernels.cross_entropy`.

    Arguments as for torch's own, its old size_average and reduce included, and those of
    `cross_entropy` after them.

    input: [V], [N, V] or [N, V, d, ...], the classes in dimension 1; target: class indices [],
        [N] or [N, d, ...].
    Probability targets, floating and of the input's shape, go to `F.cross_entropy`. They are not
        counted, so with a meter, z_loss or softcap they raise ValueError.
    In the loops of `esper_train` the module is read for its options, and the fused step runs.

    Returns float32 for every input but float64.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        meter: Meter | None = None,
        config: KernelConfig | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.meter = meter
        self.config = config

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of input and target, as the class describes them."""
        for name, x in (("input", input), ("target", target)):
            if not isinstance(x, Tensor):
                raise checks.not_dense(name, x, "a tensor")
        if target.is_floating_point() and target.shape == input.shape:
            return self._of_probabilities(input, target)
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            class_dim=-1 if input.dim() <= 2 else 1,
            meter=self.meter,
            config=self.config,
        )

    def _of_probabilities(self, input: Tensor, target: Tensor) -> Tensor:
        if self.meter is not None or self.z_loss or self.softcap is not None:
            raise ValueError(
                "probability targets are served by F.cross_entropy, which has no meter, z_loss or "
                "softcap; pass class indices, or leave these out"
            )
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(nn.Module):
    """`nn.LinearCrossEntropyLoss` (torch 2.13) by `esper_kernels.linear_cross_entropy`: the last
    layer of a classifier, `linear`, and its loss, without the logits of the batch.

    in_features, num_classes, bias, device and dtype make the layer. The others are torch's own,
    except for its `options` (there are always chunks), and then those of `linear_cross_entropy`,
    whose class_weight is `weight` here. A state dict of either module loads into the other.

    input: [..., in_features]; target: class indices [...]. Probability targets are refused.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        meter: Meter | None = None,
        config: KernelConfig | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            checks.check_integer(name, size)
        checks.check_flag("bias", bias)
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.meter = meter
        self.config = config

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of input and target, as the class describes them."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            meter=self.meter,
            config=self.config,
        )
