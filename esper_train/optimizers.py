"""One optimizer a group: the host's, and one for each slot, attached and detached as seeds come and go."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


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
        for optimizer in self._present():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of every optimizer."""
        for optimizer in self._present():
            optimizer.step()

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

    def _present(self) -> list[Optimizer]:
        return [optimizer for optimizer in self._optimizers.values() if optimizer is not None]
