"""Parameters that FSDP2 divides among the ranks, each of which holds and trains a part of them.

FSDP2 gathers a block's parameters before the block runs, and adds up their gradients after it. What
comes after that works on plain tensors: optimizers and statistics see this rank's part of each
parameter. States hold DTensors, from which `whole` makes the tensors of one process.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from esper_kernels import GradStats


class Shards:
    """The parts of a model's parameters that this rank holds.

    Making it divides the model: each of the blocks that is called by itself, then what is left.
    Parameters that several blocks share stay with what is left. `forwards` names the methods of the
    model that run it as calling it does. `ValueError` for a parameter that cannot be divided.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], forwards: Sequence[str] = ()
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        require_rows(model)
        for block in (*_apart(blocks), model):
            self._divide(block)
        for name in forwards:
            register_fsdp_forward_method(model, name)
        model.register_load_state_dict_pre_hook(_divide_weights)
        self._parts: dict[Tensor, nn.Parameter] = {p: _part(p) for p in model.parameters()}
        self._wholes = {id(part): p for p, part in self._parts.items()}

    def _divide(self, block: nn.Module) -> None:
        # for the root of a network, FSDP2 would keep whole parameters after an evaluation
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        assert isinstance(block, FSDPModule)
        # sums: losses are divided by the weight of all rows
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)

    def add(self, block: nn.Module) -> None:
        """Divide a block that is about to become a part of the model, and forget those that are not
        any more. No collective; the ranks need the same weights before."""
        if next(block.parameters(), None) is None:
            return
        self._divide(block)
        present = set(self._model.parameters())
        kept = {p: part for p, part in self._parts.items() if p in present}
        self._parts = kept | {p: _part(p) for p in block.parameters()}
        self._wholes = {id(part): p for p, part in self._parts.items()}

    @contextmanager
    def alone(self, parameters: Collection[Tensor]) -> Iterator[None]:
        """A context in which these parameters alone receive gradients. FSDP2 replaces parameters by
        whole ones in each pass, so that `backward(inputs=...)` cannot name them."""
        chosen = {id(p) for p in parameters}
        others = [p for p in self._parts if p.requires_grad and id(p) not in chosen]
        try:
            for p in others:
                p.requires_grad_(False)
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def agree(self, holds: bool) -> bool:
        """Whether something holds on every rank: one collective."""
        everywhere = torch.tensor(int(holds), device=self._mesh.device_type)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere.item())

    def part(self, p: Tensor) -> nn.Parameter:
        """This rank's rows of a parameter of the model, as a plain leaf tensor."""
        return self._parts[p]

    def take_gradients(self) -> None:
        """After a backward pass: give each part its rows of the gradient."""
        for p, part in self._parts.items():
            part.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
            p.grad = None

    def measured(
        self, stats: GradStats, parts: Sequence[Tensor], over_steps: Tensor | None = None
    ) -> GradStats:
        """The statistics of whole gradients, from those of this rank's parts: one collective. The
        largest magnitudes stay those of the parts. `over_steps`, int64 [3, T], are counts of
        several steps, which are added up over the ranks too, in place."""
        counts = [stats.counts] if over_steps is None else [stats.counts, over_steps]
        sums = torch.cat([stats.norms.square()[None], *(each.double() for each in counts)])
        dist.all_reduce(sums)
        stats.norms.copy_(sums[0].sqrt())
        for each, whole in zip(counts, sums[1:].split(3), strict=True):
            each.copy_(whole)
        stats.total_norm.copy_(sums[0].sum().sqrt())
        stats.found_inf.copy_(stats.counts[1:].sum() > 0)
        numels = [0 if part.grad is None else self._wholes[id(part)].numel() for part in parts]
        return replace(stats, numels=tuple(numels))

    def follow(self, optimizer: Optimizer) -> None:
        """Let the state of an optimizer of parts be saved as DTensors, and be restored from those
        or from the state of one process."""
        optimizer.register_state_dict_post_hook(self._joined)
        optimizer.register_load_state_dict_pre_hook(self._divided)

    def whole(self, state: Any) -> Any:
        """A state with the tensors of one process in place of DTensors: one collective for each, so
        every rank calls it."""
        if isinstance(state, DTensor):
            return state.full_tensor()
        if isinstance(state, dict):
            result = copy.copy(state)  # with the attributes that a module's state has
            result.update((key, self.whole(value)) for key, value in state.items())
            return result
        if type(state) in (list, tuple):
            return type(state)(self.whole(value) for value in state)
        return state

    def _joined(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        def join(value: Any, p: Tensor) -> Any:
            assert isinstance(p, DTensor)
            if not isinstance(value, Tensor) or value.shape != self._parts[p].shape:
                return value
            return DTensor.from_local(
                value,
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )

        return self._changed(optimizer, state, join)

    def _divided(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        def divide(value: Any, p: Tensor) -> Any:
            if isinstance(value, Tensor) and value.shape == p.shape:
                return _rows_of(value, p).to_local()
            return value

        return self._changed(optimizer, state, divide)

    def _changed(
        self,
        optimizer: Optimizer,
        state: dict[str, Any],
        change: Callable[[Any, Tensor], Any],
    ) -> dict[str, Any]:
        """The state with each value that belongs to a parameter changed."""
        parts = [part for group in optimizer.param_groups for part in group["params"]]
        by_place = {
            place: {
                name: change(value, self._wholes[id(parts[place])]) for name, value in own.items()
            }
            for place, own in state["state"].items()
        }
        return state | {"state": by_place}


def require_rows(module: nn.Module) -> None:
    """`ValueError` for a parameter without dimensions, which has no rows to divide."""
    for name, p in module.named_parameters():
        if p.dim() == 0:
            raise ValueError(
                "distributed.strategy 'fsdp2' divides the rows of parameters, and "
                f"{type(module).__name__} has the parameter {name!r} without dimensions; give it "
                "the shape [1], or use 'ddp'"
            )


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that is divided; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _apart(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that have parameters, none of which another block has too."""
    owners: dict[nn.Parameter, int] = {}
    for block in blocks:
        for p in block.parameters():
            owners[p] = owners.get(p, 0) + 1
    return [
        block
        for block in blocks
        if [*block.parameters()] and all(owners[p] == 1 for p in block.parameters())
    ]


def _part(p: Tensor) -> nn.Parameter:
    assert isinstance(p, DTensor)
    with torch.no_grad():
        return nn.Parameter(p.to_local(), requires_grad=p.requires_grad)


def _rows_of(value: Tensor, p: Tensor) -> DTensor:
    """This rank's rows of a whole tensor, divided as the parameter."""
    assert isinstance(p, DTensor)
    if isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def _divide_weights(model: nn.Module, state: dict[str, Any], *others: Any) -> None:
    """Let the model restore the weights of one process."""
    for name, p in model.named_parameters(remove_duplicate=False):  # tied ones have two names
        if name in state:
            # one number is one row, as a module's own hook may say only after this one
            value = state[name]
            state[name] = _rows_of(value if value.dim() else value.reshape(1), p)
