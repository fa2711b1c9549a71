"""The classes of the logits that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from esper_kernels import checks
from esper_kernels.places import check_group

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ClassShard:
    """The classes of one rank: `first`, `first` + 1, ..., as many as its logits have.

    first: the class of the rank's first logit.
    num_classes: those of all ranks together. Their shards must be adjacent and cover [0,
        num_classes) once.
    group: the ranks among which the classes are divided; None for all ranks.

    `across` and `of` find these numbers, and check them.
    """

    first: int
    num_classes: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        checks.check_integer("first", self.first)
        checks.check_integer("num_classes", self.num_classes)
        check_group(self.group)
        if not 0 <= self.first < self.num_classes:
            raise ValueError(
                f"first must be in [0, num_classes = {self.num_classes}), got {self.first}"
            )

    def even_share(self) -> int:
        """The most classes that a rank would have if all had as many, the same on every rank."""
        return -(-self.num_classes // dist.get_world_size(self.group))

    @staticmethod
    def across(own_classes: int, group: dist.ProcessGroup | None = None) -> ClassShard:
        """The shard of this rank, whose logits have `own_classes` classes, where the ranks hold
        the classes in the order of their ranks. Once, before training: all ranks must call it, and
        it waits for all of them."""
        checks.check_integer("own_classes", own_classes)
        check_group(group)
        found = [0] * dist.get_world_size(group)
        dist.all_gather_object(found, own_classes, group=group)
        if min(found) < 1:
            raise ValueError(f"every rank must hold at least one class, got {found} of the ranks")
        return ClassShard(sum(found[: dist.get_rank(group)]), sum(found), group)

    @staticmethod
    def of(logits: DTensor) -> ClassShard:
        """The shard of `logits.to_local()`, for logits [..., V] that are sharded along their last
        dimension over one dimension of their mesh. Needs no communication."""
        # not at the top, because importing it takes as long as importing torch
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(logits, DTensor):
            raise TypeError(
                f"logits must be a DTensor, got {checks.describe(logits)}; for plain tensors use "
                "ClassShard.across(logits.shape[-1], group)"
            )
        last = logits.dim() - 1
        places = [
            i
            for i, placement in enumerate(logits.placements)
            if isinstance(placement, Shard) and placement.dim % logits.dim() == last
        ]
        others = [p for i, p in enumerate(logits.placements) if i not in places]
        sums = [p for p in others if not isinstance(p, (Replicate, Shard))]
        if len(places) != 1 or sums:
            raise ValueError(
                "expected logits that are sharded along their last dimension over one dimension of "
                f"their mesh, and are no partial sums, got placements {logits.placements}; "
                "redistribute them, or pass plain tensors with a ClassShard"
            )
        group = logits.device_mesh.get_group(places[0])
        ranks = dist.get_world_size(group)
        classes = logits.shape[-1]
        size = -(-classes // ranks)  # as torch.chunk divides them
        if size * (ranks - 1) >= classes:  # the same on every rank, so that none waits
            raise ValueError(
                f"every rank must hold at least one class, but {classes} classes in shards of "
                f"{size} leave some of {ranks} ranks without any; use fewer ranks or add classes"
            )
        return ClassShard(size * dist.get_rank(group), classes, group)


def all_classes(shard: ClassShard) -> int:
    """The number of classes that all ranks hold together; TypeError if the argument is not a
    shard."""
    if not isinstance(shard, ClassShard):
        raise TypeError(f"shard must be a ClassShard, got {checks.describe(shard)}")
    return shard.num_classes


def check_shard(shard: ClassShard, own_classes: int, name: str) -> None:
    """Check that `own_classes` classes are a shard of all; name: the argument that has them."""
    most = all_classes(shard) - shard.first
    if own_classes > most:
        raise ValueError(
            f"expected at most {most} classes from {shard.first} on, of {shard.num_classes} in "
            f"all, got {name} with {own_classes}"
        )


def gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ...] of x [...] on each rank, in the order of their ranks: one collective."""
    result = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(result), x.contiguous(), group=group)
    return result
