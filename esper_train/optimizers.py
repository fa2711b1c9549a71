"""One optimizer a group: the host's, and one for each slot, attached and detached as seeds come and go."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


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
            group: [] if optimizer is None else _parameters(optimizer) for group, optimizer in self._optimizers.items()
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
        """A step of every optimizer that changes no bit where `skip` ([], on the device) is not 0; no host sync.

        `ValueError` for an optimizer whose state does not begin as zeros on the parameters' device.
        """
        for optimizer in self.present():
            if type(optimizer) not in (SGD, Adam, AdamW) or optimizer.defaults.get("dampening"):
                raise ValueError(
                    "steps can be skipped of SGD without dampening, Adam and AdamW, not of "
                    f"{type(optimizer).__name__}; use one of these, or another train.on_bad_numbers"
                )
            kept = copies([*_parameters(optimizer), *state_tensors(optimizer)])
            known = {id(tensor) for tensor, _ in kept}
            optimizer.step()
            made = [tensor for tensor in state_tensors(optimizer) if id(tensor) not in known]
            put_back([*kept, *((tensor, torch.zeros_like(tensor)) for tensor in made)], skip)

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


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer remembers of its parameters."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor with a copy of its present value, for `put_back`."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


@torch.no_grad()
def put_back(kept: Sequence[tuple[Tensor, Tensor]], where: Tensor) -> None:
    """Give the tensors their copied values again if `where` ([]) is not 0; decided on the device."""
    for tensor, value in kept:
        if tensor.device != where.device:
            raise ValueError(
                f"to skip a step without a sync, an optimizer's state must be on {where.device}, got some on "
                f"{tensor.device}; make it with fused=True or capturable=True"
            )
        tensor.copy_(torch.where(where != 0, value, tensor))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
