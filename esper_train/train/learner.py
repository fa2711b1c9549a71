"""A learner: parameters that learn beside a network, from the same batches, without changing it.

`step` makes a learner's pass after a batch's backward; `loop` steps its optimizers apart.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from esper_train.train.amp import LossScaler


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """Parameters that learn by a pass of their own, from a place within the network to the loss.

    The model's `forward_feeding` gives what came to that place in the batch's own pass; the
    learner's pass begins there, by `forward(x, alpha={start: 1.0}, start=start)`, and only
    `parameters` receive gradients. Their gradients are measured, clipped, scaled and skipped apart
    from those of the network.
    """

    start: str
    """Name of the place; its results are reported under this name."""
    groups: tuple[str, ...]
    """Its groups in the optimizer registry."""
    parameters: tuple[Tensor, ...] | None
    """The parameters that learn, at least one; None where `scope` lets no others receive
    gradients."""
    buffers: tuple[Tensor, ...]
    """The buffers that its pass may change; they are restored where its step is skipped."""
    scope: Callable[[], AbstractContextManager[None]]
    """Entered around its pass: keeps the pass from changing anything of the network."""
    scaler: LossScaler | None = None
    """Its own loss scaler, where the run computes in float16."""
