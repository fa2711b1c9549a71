"""Compiles the Triton kernels of divided classes for real GPUs: `python -m
tests.helpers.divided_kernels` prints the registers and spilled bytes of each. Needs Triton with its
interpreter off."""

import json

import torch
from torch import Tensor

from benchmarks.triton_resources import TARGETS, recorded, resources
from esper_kernels import ClassShard
from esper_kernels.measures import MeasurePlan
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.vocab_parallel import triton

ROWS = 4


MEASURES = MeasurePlan(per_class=0, calibration_bins=0, entropy=1, confusion=0)


def every_kernel(logits: Tensor, options: Options) -> None:
    """The sums without and with measures, and the gradient."""
    targets = torch.zeros(ROWS, dtype=torch.int64)
    numbers = torch.zeros(ROWS)
    one = torch.ones(())
    classes = logits.shape[-1]
    shard = ClassShard(classes, 2 * classes)
    for plan in (None, MEASURES):
        triton.class_sums(logits, targets, options, numbers, plan, shard)
    of_rows = (numbers, numbers, one.double())
    triton.backward(one, logits, targets, *of_rows, options, shard, None)


def main() -> None:
    rows = []
    for classes in (10, 50257):
        everything = Options(
            weight=torch.ones(2 * classes),
            label_smoothing=0.1,
            softcap=30.0,
            second=torch.zeros(ROWS, dtype=torch.int64),
            shares=torch.ones(2, ROWS),
        )
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.zeros(ROWS, classes, dtype=dtype)
            for name, options in (("plain", Options()), ("everything", everything)):
                title = f"{classes} classes, {dtype}, {name}"
                variants = recorded(
                    title, lambda logits=logits, options=options: every_kernel(logits, options)
                )
                rows += [resources(variant, target) for variant in variants for target in TARGETS]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
