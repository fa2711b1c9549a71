"""Linear cross entropy with the classes divided among ranks: cases, and what one rank computes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_kernels import (
    ClassShard,
    KernelConfig,
    Meter,
    linear_cross_entropy,
    linear_cross_entropy_step,
)

CLASSES = 29
TOPK = (1, 3)


class LinearCase(NamedTuple):
    """Inputs that every rank and the test itself make anew. The logits are multiples of 1/4 that
    bfloat16 holds exactly, so that every dtype ranks them alike, with many ties."""

    name: str
    hidden: Tensor  # [..., 6]
    weight: Tensor  # [CLASSES, 6]
    bias: Tensor | None
    targets: Tensor
    options: dict[str, Any]
    config: KernelConfig


def linear_cases(served: list[tuple[str, torch.dtype]]) -> Iterator[LinearCase]:
    for backend, dtype in served:
        for name, bias, hidden, targets, options in _samples():
            generator = torch.Generator().manual_seed(2)
            weight = torch.randint(-4, 5, (CLASSES, 6), generator=generator) / 4
            yield LinearCase(
                f"linear {name}, {dtype}, {backend}",
                hidden.to(dtype),
                weight.to(dtype),
                (torch.arange(CLASSES) % 5 / 4).to(dtype) if bias else None,
                targets,
                options,
                KernelConfig(backend=backend),
            )


def _samples() -> Iterator[tuple[str, bool, Tensor, Tensor, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randint(-1, 2, (4, 5, 6), generator=generator).float()
    targets = torch.randint(CLASSES, (4, 5), generator=generator)
    targets[1, 2] = targets[3, 0] = -100
    weights = torch.linspace(0.5, 2.0, CLASSES)
    everything = {"class_weight": weights, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
    mixup = {"targets2": targets.roll(1, -1), "share": 0.3}
    yield "plain", False, hidden, targets, {}
    yield "everything", True, hidden, targets, everything
    yield "sum", True, hidden, targets, {"reduction": "sum"}
    yield "per row", True, hidden, targets, {**everything, "reduction": "none"}
    yield "normalizer", True, hidden, targets, {"normalizer": torch.tensor(7.0)}
    yield "mixup", True, hidden, targets, {**everything, **mixup}
    yield "all ignored", True, hidden, torch.full_like(targets, -100), {}
    yield "no rows", True, hidden[:, :0], targets[:, :0], {"reduction": "sum"}
    columns = hidden.flatten(0, 1).t().contiguous().t()  # each of its columns in one piece
    yield "hidden in columns", True, columns, targets.flatten(), {}
    broken = hidden.clone()
    broken[0, 1] = torch.nan
    broken[2, 2] = torch.inf
    yield "broken rows", True, broken, targets, {}


def measuring() -> Meter:
    """A meter of everything. No confidence of the cases lies between two bins."""
    return Meter("cpu", topk=TOPK, per_class=CLASSES, calibration_bins=7, entropy=True)


def linear_results(
    case: LinearCase, rank: int, sizes: list[int], called: list[str]
) -> dict[str, Any]:
    """Loss, gradients and counts of one case, and how many collectives each part took."""
    weight = case.weight.split(sizes)[rank].clone().requires_grad_()
    bias = None if case.bias is None else case.bias.split(sizes)[rank].clone().requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    options = {**case.options, "shard": ClassShard.across(len(weight)), "config": case.config}
    meter = Meter("cpu", topk=TOPK)
    called.clear()
    loss = linear_cross_entropy(hidden, weight, case.targets, bias=bias, **options, meter=meter)
    wanted = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad(loss.sum(), wanted)
    collectives = list(called)
    everything = measuring()
    called.clear()
    linear_cross_entropy(hidden, weight, case.targets, bias=bias, **options, meter=everything)
    measured_collectives = list(called)
    steps: list[Tensor] = []
    if "reduction" not in options or options["reduction"] != "none":
        memory = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        if case.weight.dtype == torch.float64:
            memory = memory.double()
        found = linear_cross_entropy_step(
            hidden, weight, case.targets, None, bias=bias, **options, weight_grad=memory
        )
        steps = [x for x in found if x is not None]
    return {
        "loss": loss.detach(),
        "grads": grads,
        "steps": steps,
        "meter": meter.state_dict(),
        "measures": everything.state_dict(),
        "collectives": (collectives, measured_collectives),
    }
