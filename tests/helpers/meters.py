"""Meters of two processes: what each finds after it has added up those of both."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esper_kernels import Meter, MeterResult, cross_entropy, cross_entropy_step


def meters_of_a_rank(rank: int, directory: Path) -> dict[str, Any]:
    """Rank 0 counts one row per batch, rank 1 two; all have class 0 first, and the target is the
    rank."""
    logits, targets = torch.zeros(1 + rank, 2), torch.full((1 + rank,), rank)
    meter = Meter("cpu", per_class=2, calibration_bins=2)
    found: dict[str, Any] = {}

    def add_up(name: str, meter: Meter) -> None:
        meter.all_reduce()
        found[name] = short(meter.compute())

    cross_entropy_step(logits, targets, meter)
    add_up("once", meter)
    first = meter.compute()
    found["measures"] = [first.per_class.support, first.calibration.rows]  # type: ignore[union-attr]
    add_up("twice", meter)
    torch.save(meter.state_dict(), directory / f"state{rank}.pt")
    cross_entropy_step(logits, targets, meter)
    add_up("another batch", meter)

    loaded = meter.empty_copy()
    dist.barrier()  # until rank 0 has saved
    loaded.load_state_dict(torch.load(directory / "state0.pt", weights_only=True))
    torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(logits, targets, meter=loaded)
    add_up("loaded from rank 0", loaded)
    add_up("in a compiled graph", loaded)

    infinite = Meter("cpu")
    cross_entropy(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([rank]), meter=infinite)
    infinite.all_reduce()
    add_up("infinite", infinite)

    ranks = [dist.new_group([0]), dist.new_group([1])]
    try:
        meter.all_reduce(ranks[rank])
    except ValueError as error:
        found["another group"] = str(error)
    meter.reset()
    cross_entropy_step(logits, targets, meter)
    add_up("reset", meter.to("cpu"))
    return found


def short(result: MeterResult) -> list[float]:
    return [result.valid, result.correct[1], result.batches, result.loss_sum]
