"""A task whose second process dies in the middle of an epoch, unless it was restarted.

`--task tests.helpers.killed_rank:TASK` finds it from the root of the tree.
"""

import os
import signal
from dataclasses import replace

from torch import Tensor

from tests.helpers.ranks import tables

DEADLY_STEP = 17
"""The number of the step, counted from 1; there are five per epoch."""


class KilledAt:
    """An augmentation that ends its own process, as `kill -9` does."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        doomed = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if doomed and self.steps == DEADLY_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs, targets


TASK = replace(tables(33), name="killed", augment=KilledAt())
