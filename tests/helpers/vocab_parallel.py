"""One rank of tests/kernels/test_vocab_parallel.py: `python -m tests.helpers.vocab_parallel RANK
RANKS FOLDER` writes what it computed to `FOLDER/RANK.pt`."""

import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
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
    KernelConfig,
    Meter,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_step,
)
from esper_kernels.measures import MOST_CONFUSION_CLASSES
from esper_kernels.native import UNAVAILABLE
from esper_kernels.ops.linear_cross_entropy import sizes as linear_sizes
from esper_kernels.testing import cross_entropy_samples
from tests.helpers.linear_shards import CLASSES, linear_cases, linear_results

TOPK = (1, 2, 5)
SERVED = [("eager", torch.float64), ("eager", torch.float32)]
if UNAVAILABLE is None:
    SERVED += [("cpp", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def served(ranks: int) -> list[tuple[str, torch.dtype]]:
    """Backends and dtypes: all of them for two ranks. With more ranks only the shards are others,
    so each backend computes in one dtype."""
    return SERVED if ranks == 2 else [next(each) for _, each in groupby(SERVED, lambda x: x[0])]


class Case(NamedTuple):
    """Inputs that every rank and the test itself make anew."""

    name: str
    logits: Tensor  # of all classes
    targets: Tensor
    options: dict[str, Any]
    config: KernelConfig


def cases(ranks: int) -> Iterator[Case]:
    """The samples that have a class for each rank, and more."""
    for backend, dtype in served(ranks):
        config = KernelConfig(backend=backend)
        for name, logits, targets, options in (*cross_entropy_samples(dtype), *_more(dtype)):
            if logits.shape[-1] >= ranks:
                yield Case(f"{name}, {dtype}, {backend}", logits, targets, options, config)


def _more(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 13, generator=generator).to(dtype)
    targets = torch.randint(13, (9,), generator=generator)
    targets[3] = -100
    mixup = {"targets2": targets.roll(1), "share": torch.linspace(0, 1, 9)}
    yield "mixup", logits, targets, mixup
    everything = {"weight": torch.linspace(0.5, 2.0, 13), "label_smoothing": 0.1, "z_loss": 0.01}
    yield "mixup, everything", logits, targets, {**mixup, **everything, "softcap": 3.0}
    yield "all ignored", logits, torch.full((9,), -100), everything
    yield "few values, many ties", logits.round(), targets, {}


def sizes_of(name: str, classes: int, ranks: int) -> list[int]:
    """The number of classes that each rank holds: divided as by torch.chunk or, for names of odd
    length, one for each rank but the last."""
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


def measuring(classes: int, topk: tuple[int, ...]) -> Meter:
    """A meter of everything."""
    confusion = classes <= MOST_CONFUSION_CLASSES
    return Meter(
        "cpu", topk=topk, per_class=classes, calibration_bins=3, entropy=True, confusion=confusion
    )


def results(case: Case, rank: int, ranks: int, called: list[str]) -> dict[str, Any]:
    """Loss, gradient and counts of one case, and how many collectives each part took."""
    parts = case.logits.split(sizes_of(case.name, case.logits.shape[-1], ranks), -1)
    shard = ClassShard.across(parts[rank].shape[-1])
    leaf = parts[rank].detach().clone().requires_grad_()
    meter = Meter("cpu", topk=TOPK)
    counted = []

    called.clear()
    options = {**case.options, "config": case.config}
    loss = vocab_parallel_cross_entropy(leaf, case.targets, shard, **options, meter=meter)
    counted.append(len(called))
    called.clear()
    (grad,) = torch.autograd.grad(loss, leaf)
    counted.append(len(called))
    called.clear()
    given = {**options, "grad_scale": 3.0}
    step = vocab_parallel_cross_entropy_step(parts[rank], case.targets, None, shard, **given)
    counted.append(len(called))
    everything = measuring(case.logits.shape[-1], TOPK)
    called.clear()
    vocab_parallel_cross_entropy(leaf, case.targets, shard, **options, meter=everything)
    counted.append(len(called))
    out = torch.full_like(step, 7.0)
    vocab_parallel_cross_entropy_step(parts[rank], case.targets, None, shard, **given, out=out)
    inplace = parts[rank].clone(memory_format=torch.contiguous_format)
    vocab_parallel_cross_entropy_step(inplace, case.targets, None, shard, **given, inplace=True)
    rows = vocab_parallel_cross_entropy(
        leaf, case.targets, shard, **{**options, "reduction": "none", "normalizer": None}
    )
    return {
        "shard": (shard.first, shard.num_classes),
        "loss": loss.detach(),
        "rows": rows.detach(),
        "grad": grad,
        "step": step,
        "step into memory": (out, inplace),
        "meter": meter.state_dict(),
        "measures": everything.state_dict(),
        "collectives": counted,
    }


def from_dtensor() -> dict[str, Any]:
    """The gradient and the measures of a DTensor's logits, and how one with fewer classes than
    ranks is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 3, 10, generator=generator)
    logits = distribute_tensor(whole, mesh, [ShardPlacement(2)]).requires_grad_()
    targets = torch.randint(10, (4, 3), generator=generator)
    shard = ClassShard.of(logits)
    meter = Meter("cpu", per_class=10, calibration_bins=3, entropy=True)
    vocab_parallel_cross_entropy(logits.to_local(), targets, shard, meter=meter).backward()
    assert logits.grad is not None
    refusal = ""
    try:
        ClassShard.of(distribute_tensor(torch.zeros(2, mesh.size() - 1), mesh, [ShardPlacement(1)]))
    except ValueError as error:
        refusal = str(error)
    grad = logits.grad.full_tensor()
    found = {"whole": whole, "targets": targets, "grad": grad, "refusal": refusal}
    return {**found, "measures": meter.state_dict()}


def linear_from_dtensor() -> dict[str, Any]:
    """The gradients of hidden and of a DTensor, a weight whose classes are divided."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(10, 4, generator=generator)
    hidden = torch.randn(3, 4, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 9, 4])
    weight = distribute_tensor(whole, mesh, [ShardPlacement(0)]).requires_grad_()
    shard = ClassShard.of(weight.t())
    linear_cross_entropy(hidden, weight.to_local(), targets, shard=shard).backward()
    assert weight.grad is not None
    found = {"hidden": hidden.detach(), "whole": whole, "targets": targets}
    return {**found, "grads": (hidden.grad, weight.grad.full_tensor())}


def use_small_chunks() -> None:
    """Small batches of linear cross entropy in several chunks and panels, the last of them
    ragged."""
    linear_sizes.CPU_PANEL = 8
    linear_sizes.chunk_rows = lambda *arguments: 7  # type: ignore[assignment]


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
    found["linear DTensor"] = linear_from_dtensor()
    use_small_chunks()
    for case in linear_cases(served(ranks)):
        sizes = sizes_of(case.name, CLASSES, ranks)
        found[case.name] = linear_results(case, rank, sizes, called)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
