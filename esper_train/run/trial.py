"""The trial of a seed: from the moment blending begins until it is kept, or undone.

`epoch` begins and ends it. Meanwhile the network adapts to a seed that may still fail. So the
earlier state is remembered, in checkpoints too, and is restored bit for bit if it does.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from esper_train.base.state import PlainState, copied, tensors_of
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import paired_error
from esper_train.morph.lifecycle import TRIAL
from esper_train.morph.model import MorphModel
from esper_train.train.optimizers import OptimizerRegistry


class Network(Protocol):
    """The state that an undone trial restores: weights, running statistics and momentum."""

    model: MorphModel
    optimizers: OptimizerRegistry


class Trial(PlainState):
    """The trial of a seed: at most one seed is on trial at a time. Also counts how long no seed may
    germinate afterwards."""

    STATE: ClassVar[tuple[str, ...]] = ("slot", "began", "wait", "undone", "epochs", "_next_wait")

    def __init__(self, growth: GrowthConfig) -> None:
        self._growth = growth
        self.slot: str | None = None
        """Slot of the seed on trial; None while there is no trial."""
        self.began = 0
        """Epoch after which blending began."""
        self.wait = 0
        """Epochs for which no seed may germinate."""
        self.undone = 0
        """Trials that ended with the network going back."""
        self.epochs = 0
        """Epochs that those trials took, whose training was lost."""
        self._next_wait = growth.undo_wait
        self._before: dict[str, Any] | None = None
        self._right: Tensor | None = None

    def begin(
        self, network: Network, slot: str, epoch: int, right: Tensor, device: torch.device
    ) -> None:
        """Remember the network, on `device`, as blending begins after `epoch`; `right` says which
        validation rows it predicts."""
        if self.slot is not None:
            raise RuntimeError(f"the seed in slot {self.slot!r} is on trial already")
        self.slot = slot
        self.began = epoch
        self._right = right
        state = {
            "seeds": {s.state.slot: s.state.seed_id for s in network.model.slots},
            "model": network.model.state_dict(),
            "optimizers": network.optimizers.state_dict(),
        }
        self._before = copied(state, device)

    def tolerance(self, right: Tensor, rows: int) -> float | None:
        """Standard error of the difference in accuracy since blending began, in percentage points,
        from the validation rows predicted now; None without a trial."""
        if self._right is None:
            return None
        gained = (right & ~self._right).sum()
        lost = (~right & self._right).sum()
        return paired_error(int(gained), int(lost), rows)

    def end_kept(self) -> None:
        """The seed became permanent."""
        self._next_wait = self._growth.undo_wait
        self._end()

    def end_undone(self, network: Network, epoch: int) -> None:
        """Bring the network back to where it was when blending began; the seed is culled already.

        Weights, running statistics and momentum return; learning rates and schedules go on. A seed
        that was not there yet in another slot stays as it is.
        """
        assert self._before is not None
        before = self._before
        self.undone = self.undone + 1
        self.epochs += epoch - self.began
        self.wait = self._next_wait
        self._next_wait = min(2 * self._next_wait, self._growth.undo_wait_ceiling)
        model = network.model
        optimizers = network.optimizers
        now = {slot.state.slot: slot.state.seed_id for slot in model.slots}
        same = {
            name for name, seed in before["seeds"].items() if seed is not None and seed == now[name]
        }
        weights = {
            name: value
            for name, value in before["model"].items()
            if not name.startswith("seed_slots.") or name.split(".")[1] in same
        }
        present = {name: value for name, value in weights.items() if name in model.state_dict()}
        model.load_state_dict(present, strict=False)
        for group in optimizers.parameters():
            if group.partition(".")[0] in {"host", *same} and group in before["optimizers"]:
                optimizers.return_momentum(group, before["optimizers"][group])
        self._end()

    def tick(self) -> None:
        """Count one epoch."""
        self.wait = max(0, self.wait - 1)

    def check(self, model: MorphModel) -> None:
        """Raise `ValueError` unless this is the trial of `model` and could undo its seed."""
        blending = [slot.state.slot for slot in model.slots if slot.state.stage in TRIAL]
        if blending != ([] if self.slot is None else [self.slot]):
            raise ValueError(
                f"trial: expected that of the seeds in slots {blending}, which blend in or are on "
                f"probation, got that of slot {self.slot!r}; go on from another checkpoint"
            )
        if self.slot is None:
            return
        before = self._before
        if before is None or not {"seeds", "model", "optimizers"} <= before.keys():
            raise ValueError(
                f"trial: the state from before the seed in slot {self.slot!r} is missing, so it "
                "could not be undone; go on from another checkpoint"
            )
        if self._right is None or self._right.dtype != torch.bool:
            raise ValueError(
                "trial: expected a bool for each validation row, by which accuracies are compared, "
                "got none; go on from another checkpoint"
            )
        weights = tensors_of(before["model"])
        for name, value in tensors_of(model.host.state_dict(prefix="host.")).items():
            found = weights[name].shape if name in weights else None
            if found != value.shape:
                raise ValueError(
                    f"trial: expected a {name} of shape {tuple(value.shape)} in the state from "
                    f"before, got {found}; go on from another checkpoint"
                )

    def _end(self) -> None:
        self.slot = self._before = self._right = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"before": self._before, "right": self._right}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        super().load_state_dict(state_dict)
        self._before = copied(state_dict["before"])
        self._right = state_dict["right"]
