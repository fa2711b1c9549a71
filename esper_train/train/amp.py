"""The loss scaler of float16 training: what `torch.amp.GradScaler` does, without reading a flag on
the host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper_train.train.config import AmpConfig

GROWTH = 2.0
BACKOFF = 0.5


class LossScaler:
    """A scale on the device that grows and backs off there; owned by one run. The loss is
    multiplied by `scale`."""

    def __init__(self, config: AmpConfig) -> None:
        self._interval = config.growth_interval
        self.scale = torch.tensor(config.init_scale, dtype=torch.float32, device="cpu")
        self._good_steps = torch.zeros((), dtype=torch.int32, device="cpu")

    def to(self, device: torch.device) -> None:
        """Move the state to `device`, if it is elsewhere."""
        self.scale = self.scale.to(device)
        self._good_steps = self._good_steps.to(device)

    def inv_scale(self) -> Tensor:
        """1 / scale, exact for a power of two."""
        return self.scale.reciprocal()

    def update(self, found_inf: Tensor) -> None:
        """The next scale, after a step that was left out where `found_inf` (float32 []) is 1."""
        torch._amp_update_scale_(
            self.scale, self._good_steps, found_inf, GROWTH, BACKOFF, self._interval
        )

    def state_dict(self) -> dict[str, Any]:
        """Scale and good steps, as tensors."""
        return {"scale": self.scale.clone(), "good_steps": self._good_steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])
