"""Host time of a CUDA step at 64 x 10, from the Python call to its launch, beside a CPU step.

    python -m benchmarks host_time    # needs no GPU

The host code of the CUDA ops is built for CPU tensors, as the simulator of the tests has it, with
launches that do nothing. A real launch, CUDA's own caching allocator and its current stream are not
in these figures. Writes `results/host-time.json`.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing
from esper_kernels import Meter, cross_entropy_step, grad_stats
from tests.cuda_shim.build import build

CALLS = 2000  # of each candidate in a round
ROUNDS = 21


def load_host_code() -> None:
    """The CUDA ops for CPU tensors, under `torch.ops.esper_shim`, without what they launch."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "host_code.so"
        build(library, "-O2")
        torch.ops.load_library(str(library))
        ctypes.CDLL(str(library)).esper_shim_launches(False)


def candidates() -> dict[str, Callable[[], Any]]:
    """The calls whose time is measured."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=generator)
    targets = torch.randint(10, (64,), generator=generator)
    out = torch.empty_like(logits)
    meter = Meter("cpu")
    gradients: list[Tensor] = [torch.randn(64, generator=generator) for _ in range(12)]
    stats = grad_stats(gradients)
    return {
        "step": lambda: cross_entropy_step(logits, targets, meter, out=out),
        "grad_stats of 12 tensors": lambda: grad_stats(gradients, out=stats),
    }


def microseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS * 1e6


def measure() -> list[dict[str, Any]]:
    """Medians of alternating rounds; the first does not count."""
    torch.set_num_threads(1)
    load_host_code()
    own = torch.ops.esper
    calls = candidates()
    ops = {"cpp": own, "cuda, launching nothing": torch.ops.esper_shim}
    times: dict[str, dict[str, list[float]]] = {
        name: {backend: [] for backend in ops} for name in calls
    }
    others = timing.Others()
    for number in range(1 + ROUNDS):
        for name, call in calls.items():
            for backend, namespace in ops.items():
                torch.ops.esper = namespace  # type: ignore[assignment]
                time_of_call = microseconds(call)
                if number > 0:
                    times[name][backend].append(time_of_call)
    torch.ops.esper = own
    return [
        {
            "what": name,
            "microseconds": {backend: round(median(found), 2) for backend, found in row.items()},
            "busy": others.are_busy(),
        }
        for name, row in times.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per call."""
    names = list(rows[0]["microseconds"])
    lines = [["call", *(f"{name}, us" for name in names), "cuda / cpp"]]
    for row in rows:
        own, other = row["microseconds"].values()
        label = f"{row['what']} (busy)" if row["busy"] else row["what"]
        lines.append([label, f"{own:.1f}", f"{other:.1f}", f"{other / own:.2f}"])
    return record.markdown(lines)


def main() -> None:
    """Measure, print the table, and write the figures."""
    record.parser("host_time", __doc__).parse_args()
    rows = measure()
    print(f"{table(rows)}\n\n{record.write('host-time', rows)}")


if __name__ == "__main__":
    main()
