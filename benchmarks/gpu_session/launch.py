"""One step of a backend at each shape, for profilers: `python -m benchmarks.gpu_session.launch cuda
2048x8192`.

The step before it compiles and loads the kernels; only the one that counts is between the marks
that `ncu --profile-from-start off` goes by. Inputs are made on the CPU, so that no other kernel is
in the way.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu_session.smoke import sample
from esper_kernels import KernelConfig, Meter, cross_entropy_step


def main(backend: str, shapes: list[str]) -> None:
    config = KernelConfig(backend=backend)
    for shape in shapes:
        rows, classes = map(int, shape.split("x"))
        logits, targets = sample("cuda", torch.bfloat16, rows, classes)
        meter = Meter("cuda")
        out = torch.empty_like(logits)
        cross_entropy_step(logits, targets, meter, out=out, config=config)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        cross_entropy_step(logits, targets, meter, out=out, config=config)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{backend} {shape}: {meter.compute()}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.gpu_session.launch BACKEND ROWSxCLASSES...")
    main(sys.argv[1], sys.argv[2:])
