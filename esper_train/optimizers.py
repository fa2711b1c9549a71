"""One optimizer a group: the host's, and one for each slot, attached and detached as seeds come and go."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class OptimizerRegistry:
    """Optimizers by group name. Attaching or detaching one leaves the state (momentum) of the others alone."""

    def __init__(self, **optimizers: Optimizer) -> None:
        self._optimizers: dict[str, Optimizer | None] = {}
        for group, optimizer in optimizers.items():
            self.attach(group, optimizer)

    def attach(self, group: str, optimizer: Optimizer | None) -> None:
        """Add a group; None stands for one without parameters. `ValueError` if the name is taken."""
        if group in self._optimizers:
            raise ValueError(f"group {group!r} has an optimizer already; detach it first")
        self._optimizers[group] = optimizer

    def detach(self, group: str) -> None:
        """Forget a group. `ValueError` if there is none of this name."""
        if group not in self._optimizers:
            raise ValueError(f"no group {group!r}; attached are {', '.join(self._optimizers) or 'none'}")
        del self._optimizers[group]

    def __contains__(self, group: str) -> bool:
        return group in self._optimizers

    def parameters(self) -> dict[str, list[Tensor]]:
        """Group name to its parameters, in the optimizer's order."""
        return {
            group: [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
            for group, optimizer in self._optimizers.items()
        }

    def zero_grad(self) -> None:
        """Drop all gradients (`set_to_none=True`)."""
        for optimizer in self.present():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of every optimizer."""
        for optimizer in self.present():
            optimizer.step()

    def step_unless(self, skip: Tensor) -> None:
        """A step of every optimizer that changes no bit where `skip` (float32 []) is 1, decided on the device.

        `ValueError` for an optimizer that cannot leave a step out by itself.
        """
        for optimizer in self.present():
            if not all(group.get("fused") and not group.get("dampening") for group in optimizer.param_groups):
                raise ValueError(
                    "to skip a step without a host sync, expected an optimizer made with fused=True and without "
                    f"dampening, got {type(optimizer).__name__}; make it so, or use another train.on_bad_numbers"
                )
            if isinstance(optimizer, SGD):
                _start_momentum(optimizer)
            optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """State of every optimizer by group."""
        return {group: o and o.state_dict() for group, o in self._optimizers.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the same groups must be attached."""
        if set(states) != set(self._optimizers):
            raise ValueError(f"expected state for the groups {list(self._optimizers)}, got {list(states)}")
        for group, optimizer in self._optimizers.items():
            if optimizer is not None:
                optimizer.load_state_dict(states[group])

    def present(self) -> list[Optimizer]:
        """The optimizers there are, in the order of attachment."""
        return [optimizer for optimizer in self._optimizers.values() if optimizer is not None]


def _start_momentum(optimizer: SGD) -> None:
    """Momentum of 0 instead of none: torch's fused SGD leaves it uninitialised where its first step is skipped."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
