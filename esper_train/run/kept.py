"""The network that a run returns: the best by validation, or the last. `run` offers one every
epoch."""

import math
from collections.abc import Mapping
from typing import Any

from esper_train.base.state import PlainState, copied
from esper_train.morph.lifecycle import TRIAL
from esper_train.morph.model import MorphModel


class Kept(PlainState):
    """The network with the lowest validation loss so far.

    Accuracy moves in steps of one row, so the epoch with the best accuracy would often be the
    luckiest one.
    """

    STATE = ("epoch", "loss")

    def __init__(self) -> None:
        self.epoch = 0
        """The epoch after which it was like this; 0 where there is none yet."""
        self.loss = math.inf
        self._network: dict[str, Any] | None = None

    def offer(self, model: MorphModel, epoch: int, loss: float) -> None:
        """Keep a copy on the CPU if it is the best, unless the fate of a seed with a part in it is
        open. A loss of NaN is never the best."""
        if any(slot.state.stage in TRIAL for slot in model.slots):
            return
        if loss < self.loss:
            self.epoch = epoch
            self.loss = loss
            network = {"slots": model.topology(), "weights": model.state_dict()}
            self._network = copied(network, "cpu")

    def give(self, model: MorphModel) -> None:
        """Restore into the model what was kept, if anything was."""
        if self._network is not None:
            model.rebuild(self._network["slots"])
            model.load_state_dict(self._network["weights"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"network": self._network}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        super().load_state_dict(state_dict)
        self._network = state_dict["network"]
