"""One rank of tests/kernels/test_vocab_parallel.py: `python -m tests.helpers.vocab_parallel RANK
RANKS FOLDER` writes what it computed to `FOLDER/RANK.pt`."""

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor import distribute_tensor

from esper_kernels import (
    ClassShard,
    Meter,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_step,
)
from esper_kernels.testing import cross_entropy_samples

TOPK = (1, 2, 5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Inputs that every rank and the test itself make anew."""

    name: str
    logits: Tensor  # of all classes
    targets: Tensor
    options: dict[str, Any]


def cases(ranks: int) -> Iterator[Case]:
    """The samples that have a class for each rank."""
    for dtype in DTYPES:
        for sample in cross_entropy_samples(dtype):
            if sample.logits.shape[-1] >= ranks:
                name = f"{sample.name}, {dtype}"
                yield Case(name, sample.logits, sample.targets, sample.options)


def sizes_of(name: str, classes: int, ranks: int) -> list[int]:
    """How many classes each rank holds: as torch.chunk divides them, or by name one each but the
    last."""
    if len(name) % 2:
        return [1] * (ranks - 1) + [classes - ranks + 1]
    sizes = [len(part) for part in torch.arange(classes).chunk(ranks)]
    return sizes if len(sizes) == ranks else [1] * (ranks - 1) + [classes - ranks + 1]


def count_collectives() -> list[str]:
    """A list to which every later collective adds its name."""
    called: list[str] = []

    def counting(name: str) -> None:
        original = getattr(dist, name)

        def collective(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return original(*arguments, **options)

        setattr(dist, name, collective)

    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast"):
        counting(name)
    return called


def results(case: Case, rank: int, ranks: int, called: list[str]) -> dict[str, Any]:
    """Loss, gradient and counts of one case, and how many collectives each part took."""
    parts = case.logits.split(sizes_of(case.name, case.logits.shape[-1], ranks), -1)
    shard = ClassShard.across(parts[rank].shape[-1])
    leaf = parts[rank].detach().clone().requires_grad_()
    meter = Meter("cpu", topk=TOPK)
    counted = []

    called.clear()
    loss = vocab_parallel_cross_entropy(leaf, case.targets, shard, **case.options, meter=meter)
    counted.append(len(called))
    called.clear()
    (grad,) = torch.autograd.grad(loss, leaf)
    counted.append(len(called))
    called.clear()
    step = vocab_parallel_cross_entropy_step(
        parts[rank], case.targets, None, shard, **case.options, grad_scale=3.0
    )
    counted.append(len(called))
    rows = vocab_parallel_cross_entropy(
        leaf, case.targets, shard, **{**case.options, "reduction": "none", "normalizer": None}
    )
    return {
        "shard": (shard.first, shard.num_classes),
        "loss": loss.detach(),
        "rows": rows.detach(),
        "grad": grad,
        "step": step,
        "meter": meter.state_dict(),
        "collectives": counted,
    }


def from_dtensor() -> dict[str, Any]:
    """The gradient of a DTensor's logits, and its shard."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 3, 10, generator=generator)
    logits = distribute_tensor(whole, mesh, [ShardPlacement(2)]).requires_grad_()
    targets = torch.randint(10, (4, 3), generator=generator)
    shard = ClassShard.of(logits)
    vocab_parallel_cross_entropy(logits.to_local(), targets, shard).backward()
    assert logits.grad is not None
    return {"whole": whole, "targets": targets, "grad": logits.grad.full_tensor()}


def main(rank: int, ranks: int, folder: Path) -> None:
    """Join the group, compute every case, and write the results."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    called = count_collectives()
    found: dict[str, Any] = {case.name: results(case, rank, ranks, called) for case in cases(ranks)}
    found["DTensor"] = from_dtensor()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
