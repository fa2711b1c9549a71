"""Fused cross entropy with on-device metrics, and gradient statistics.

`cross_entropy` (a differentiable loss) and `cross_entropy_step` (the logits' gradient, for a loop
without a loss tensor) check their arguments, ask `select_backend` which backend serves them, and
call its module; `linear_cross_entropy` and its step are the same for the logits of a linear layer,
which never exist as a whole. `CrossEntropyLoss` and `LinearCrossEntropyLoss` are their module
forms. A `Meter` accumulates loss and counts on the device. `grad_stats` and
`clip_grad_norm_` serve gradients alike. Nothing here waits for the device except `compute_all` (and
`.compute()`, its one-source form) and `clip_grad_norm_(error_if_nonfinite=True)`. Under
`torch.compile` the cross-entropy functions are traced, backend choice included; call `grad_stats`
and the `compute` functions outside the compiled region.
"""

from esper_kernels.backends import select_backend
from esper_kernels.config import KernelConfig
from esper_kernels.info import info
from esper_kernels.measures import Averages, Calibration, ClassMeasures, Measured
from esper_kernels.meter import Meter, MeterResult
from esper_kernels.modules import CrossEntropyLoss, LinearCrossEntropyLoss
from esper_kernels.ops.cross_entropy import cross_entropy, cross_entropy_step, record_loss
from esper_kernels.ops.grad_stats import GradHealth, GradStats, clip_grad_norm_, grad_stats
from esper_kernels.ops.linear_cross_entropy import (
    LinearGradients,
    linear_cross_entropy,
    linear_cross_entropy_step,
)
from esper_kernels.ops.token_logprobs import linear_token_logprobs, token_logprobs
from esper_kernels.ops.vocab_parallel import (
    ClassShard,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_step,
)
from esper_kernels.readback import compute_all
from esper_kernels.version import __version__

__all__ = [
    "Averages",
    "Calibration",
    "ClassMeasures",
    "ClassShard",
    "CrossEntropyLoss",
    "GradHealth",
    "GradStats",
    "KernelConfig",
    "LinearCrossEntropyLoss",
    "LinearGradients",
    "Measured",
    "Meter",
    "MeterResult",
    "__version__",
    "clip_grad_norm_",
    "compute_all",
    "cross_entropy",
    "cross_entropy_step",
    "grad_stats",
    "info",
    "linear_cross_entropy",
    "linear_cross_entropy_step",
    "linear_token_logprobs",
    "record_loss",
    "select_backend",
    "token_logprobs",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_step",
]
