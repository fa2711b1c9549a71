"""Several processes that train one network: what they add up, and what they take from the first.

`run` makes `Ranks` where the config asks for them, and `optimizer_steps` reduces gradients with
them; without, nothing here is called. Collectives are torch's own, in its default process group.
Every rank calls each of them in the same order, whatever data it has.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from esper_train.base.stop import Stopped, StopRequest
from esper_train.train.config import DistributedConfig
from esper_train.train.data import Share
from esper_train.train.errors import RanksDifferError
from esper_train.train.meeting import meet

if TYPE_CHECKING:  # importing it takes half as long as importing torch
    from esper_train.train.shards import Shards

T = TypeVar("T")
BUCKET_BYTES = 25 * 2**20
"""Gradients of at least this size travel in one collective, as in torch's own DDP."""
SEED_DISTANCE = 1_000_003
"""Distance between the seeds of the ranks' random numbers."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes."""


@contextmanager
def joined(config: DistributedConfig, device: str, stop: StopRequest) -> Iterator["Ranks | None"]:
    """A context in which the process is one of the ranks that the config asks for; None for one
    process.

    A process group that the caller made is used, and left as it is. `ValueError` where there is
    none and the environment does not say how to make one; `RankLostError`, which names the ranks,
    where some did not start, failed, or do not answer any more.
    """
    if config.strategy == "none":
        yield None
        return
    if dist.is_initialized():
        yield Ranks()
        return
    kind = torch.device(device).type
    try:
        meeting = meet(config.timeout, stop)
    except ValueError as error:
        raise ValueError(
            f"distributed.strategy {config.strategy!r} needs one process per rank: start the "
            f"command with torchrun, or call torch.distributed.init_process_group first ({error})"
        ) from error
    try:
        with meeting.explained():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                store=meeting.store,
                rank=meeting.rank,
                world_size=meeting.world,
                timeout=timedelta(seconds=config.timeout),
            )
            if kind == "cuda" and torch.device(device).index is None:
                torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
            yield Ranks()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks_of(config: DistributedConfig) -> "Ranks | None":
    """The ranks of a process group that exists; None for one process."""
    if config.strategy == "none":
        return None
    if not dist.is_initialized():
        raise ValueError(
            f"distributed.strategy {config.strategy!r} needs a process group; use run_fit, "
            "run_heuristic_episode or the command, or call torch.distributed.init_process_group"
        )
    return Ranks()


class Ranks:
    """The processes of the default group, as this one sees them."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.stop = StopRequest()
        """Asked at each step and between epochs; a request to one rank stops all of them."""
        self.shards: Shards | None = None
        """Where each rank holds a part of every parameter."""

    @property
    def first(self) -> bool:
        """Whether this rank decides and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """The part of each batch that this rank trains on."""
        return Share(self.rank, self.world)

    def seed(self, seed: int) -> int:
        """The seed of random numbers that are to differ between ranks; that of rank 0 is `seed`."""
        return seed + SEED_DISTANCE * self.rank

    def from_first(self, value: T | None) -> T:
        """The value that rank 0 gave; those of other ranks are ignored."""
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0: one collective for each dtype."""
        by_dtype = sorted((t.detach() for t in tensors), key=lambda t: str(t.dtype))
        for _, group in groupby(by_dtype, key=lambda t: t.dtype):
            members = list(group)
            flat = torch.cat([t.reshape(-1) for t in members])
            dist.broadcast(flat, src=0)
            for t, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
                t.copy_(part.view(t.shape))

    def obey_stop(self) -> None:
        """Raise `Stopped` on every rank if one of them was asked to stop."""
        asked = torch.tensor([float(self.stop.signal is not None)])
        dist.all_reduce(asked)
        if asked.item() > 0:
            self.raise_stopped()

    def raise_stopped(self) -> None:
        """`Stopped` with the signal that came to this rank; where none did, SIGTERM."""
        raise Stopped(self.stop.signal or signal.SIGTERM)

    def require_equal(self, tensors: dict[str, Tensor]) -> None:
        """`RanksDifferError` unless all ranks have the same tensors: compares sums of their bits,
        in one collective."""
        if not tensors:
            return
        sums = torch.stack([_sum_of_bits(t) for t in tensors.values()])
        extremes = torch.cat([sums, ~sums])  # ~ reverses the order without overflow
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, smallest = extremes[: len(sums)], ~extremes[len(sums) :]
        flags = zip(tensors, (largest != smallest).tolist(), strict=True)
        differing = [name for name, differs in flags if differs]
        if differing:
            raise RanksDifferError(
                f"the ranks have different values in {len(differing)} of {len(tensors)} tensors, "
                f"the first {differing[0]!r}; resume from the newest checkpoint, and look for code "
                "or random numbers that change the network on some ranks only"
            )


class GradientSum:
    """Adds up the gradients of some parameters over all ranks, for the steps of one epoch.

    Which parameters have gradients is agreed at the first step; from then on a rank that has none,
    because it got no rows, contributes zeros.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor]) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._buckets: list[list[Tensor]] = []
        self._without: list[Tensor] = []

    def __call__(self, weight: Tensor | float | None) -> None:
        """Replace each gradient by the mean over the ranks, weighted by `weight` (that of this
        rank's rows); None: by the sum. A mean over nothing is 0.

        `ValueError` for a parameter that has a gradient now and had none at the first step.
        Raises `Stopped` on every rank if one was asked to stop, on the CPU; on other devices
        reading that would be a host sync, so the end of the epoch does it.
        """
        if not self._buckets:
            self._agree()
        if any(p.grad is not None for p in self._without):
            raise ValueError(
                "a parameter has a gradient that had none in the first step of the epoch on any "
                "rank; with several ranks, expected the same parameters to learn in every step"
            )
        sums = [self._flat(bucket, weight) for bucket in self._buckets]
        asked = self._ranks.stop.signal is not None
        scale = 1.0 if weight is None else weight
        news = torch.stack([torch.as_tensor(x).to(sums[0]) for x in (scale, float(asked))])
        sums[0] = torch.cat([sums[0], news])
        for work in [dist.all_reduce(flat, async_op=True) for flat in sums]:
            work.wait()
        total, stops = sums[0][-2:]
        if total.is_cpu and stops.item() > 0:
            self._ranks.raise_stopped()
        divisor = None if weight is None else torch.where(total == 0, torch.ones_like(total), total)
        for bucket, flat in zip(self._buckets, sums, strict=True):
            _give(bucket, flat if divisor is None else flat / divisor.to(flat.dtype))

    def _agree(self) -> None:
        """Find the parameters that have a gradient on any rank, and put them into buckets."""
        parameters = self._parameters
        device = parameters[0].device
        present = torch.tensor([p.grad is not None for p in parameters], device=device).int()
        dist.all_reduce(present, dist.ReduceOp.MAX)
        learning = present.bool().tolist()
        self._without = [p for p, learns in zip(parameters, learning, strict=True) if not learns]
        members = [p for p, learns in zip(parameters, learning, strict=True) if learns]
        if not members:
            raise ValueError(
                "no parameter has a gradient on any rank: the first batch of the epoch has no rows"
            )
        for _, same in groupby(sorted(members, key=_sum_name), key=_sum_name):
            bucket: list[Tensor] = []
            self._buckets.append(bucket)
            size = 0
            for p in same:
                if size >= BUCKET_BYTES:
                    bucket = []
                    self._buckets.append(bucket)
                    size = 0
                bucket.append(p)
                size += p.numel() * _sum_dtype(p).itemsize

    def _flat(self, bucket: Sequence[Tensor], weight: Tensor | float | None) -> Tensor:
        dtype = _sum_dtype(bucket[0])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.detach().reshape(-1).to(dtype) for g in gradients])
        return flat if weight is None else flat.mul_(torch.as_tensor(weight).to(flat))


def _give(bucket: Sequence[Tensor], flat: Tensor) -> None:
    """Write the values into the gradients, which keep the layout of their parameters."""
    start = 0
    for p in bucket:
        end = start + p.numel()
        if p.grad is None:
            p.grad = torch.empty_like(p, requires_grad=False)
        p.grad.copy_(flat[start:end].view(p.shape))
        start = end


def _sum_dtype(p: Tensor) -> torch.dtype:
    """Half precision is added up in float32."""
    return torch.promote_types(p.dtype, torch.float32)


def _sum_name(p: Tensor) -> str:
    return str(_sum_dtype(p))


def _sum_of_bits(t: Tensor) -> Tensor:
    """A checksum, int64 []: changes with any one value."""
    return t.detach().contiguous().view(BITS[t.element_size()]).sum(dtype=torch.int64)
