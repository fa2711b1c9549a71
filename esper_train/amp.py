"""The loss scaler of float16 training: what `torch.amp.GradScaler` does, without reading a flag on the host."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from esper_train.config import AmpConfig

GROWTH, BACKOFF = 2.0, 0.5


class LossScaler:
    """A scale on the device that grows and backs off there; owned by one run. The loss is multiplied by `scale`."""

    def __init__(self, config: AmpConfig) -> None:
        self._interval = config.growth_interval
        self.scale = torch.tensor(config.init_scale)  # float32 []
        self._good_steps = torch.zeros((), dtype=torch.int32)

    def to(self, device: torch.device) -> None:
        """Move the state to `device`, where it is not there yet."""
        self.scale, self._good_steps = self.scale.to(device), self._good_steps.to(device)

    def inv_scale(self) -> Tensor:
        """1 / scale, exact for a power of two."""
        return self.scale.reciprocal()

    def step(self, optimizers: Iterable[Optimizer], found_inf: Tensor) -> None:
        """One step of each on gradients divided by the scale, left out where `found_inf` (float32 []) is 1; then the
        next scale. `ValueError` for an optimizer that cannot leave a step out by itself."""
        for optimizer in optimizers:
            if not optimizer.defaults.get("fused") or optimizer.defaults.get("dampening"):
                name = type(optimizer).__name__
                raise ValueError(
                    "amp.dtype 'float16' needs optimizers that skip a step on the device: expected one made with "
                    f"fused=True and without dampening, got {name}; or use 'bfloat16', which needs no loss scale"
                )
            if isinstance(optimizer, SGD):
                _start_momentum(optimizer)
            optimizer.grad_scale, optimizer.found_inf = self.scale, found_inf  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        torch._amp_update_scale_(self.scale, self._good_steps, found_inf, GROWTH, BACKOFF, self._interval)

    def state_dict(self) -> dict[str, Any]:
        """Scale and good steps, as tensors."""
        return {"scale": self.scale.clone(), "good_steps": self._good_steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])


def _start_momentum(optimizer: SGD) -> None:
    """Momentum of 0 instead of none: torch's fused SGD leaves it uninitialised where its first step is skipped."""
    for group in optimizer.param_groups:
        if group["momentum"]:
            for p in group["params"]:
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
