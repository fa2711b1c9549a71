"""The parts of the session and the steps of each, in order; every step has its own time limit."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SPEED = (  # shapes for the benchmark `gpu`
    "bf16:8192x8192",
    "bf16:8192x32000",
    "bf16:8192x50257",
    "bf16:8192x128256",
    "bf16:4096x262144",
    "bf16:65536x10",
    "bf16:8192x1000",
    "grads:fp32:60x20000",
    "grads:fp32:160x160000",
    "grads:bf16:300x4000000",
)
PROFILED = (("cuda", "2048x8192"), ("cuda", "512x262144"), ("triton", "2048x8192"))
SANITIZED = ("16x10", "16x3000", "4x262144")
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, with {folder} for where it may leave JSON files that become part of the results.

    limit: seconds. needs: "device", or programs and Python modules ("module:NAME"); without one the
    step is skipped.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ("device",)
    environment: tuple[tuple[str, str], ...] = ()


def missing(need: str) -> str | None:
    """The reason why something that a step needs is missing; None if it has everything."""
    if need == "device":
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if need.startswith("module:"):
        name = need.removeprefix("module:")
        return None if importlib.util.find_spec(name) else f"Python module {name} is not installed"
    return None if shutil.which(need) else f"there is no {need}"


def parts() -> dict[str, tuple[Step, ...]]:
    """The parts by name: is it right, how fast is it, and why."""
    return {"correct": correct(), "speed": speed(), "why": why()}


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def correct() -> tuple[Step, ...]:
    query = (
        "name,driver_version,memory.total,clocks.sm,clocks.mem,"
        "clocks.max.sm,clocks.max.mem,power.limit"
    )
    build = (
        f"nvcc -std=c++17 -arch=native -o {{folder}}/clusters {HERE / 'clusters.cu'} && "
        f"{{folder}}/clusters"
    )
    workers = ("-n", "12") if missing("module:xdist") is None else ()
    pytest = python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *workers)
    tests = ("device", "module:pytest", "module:pytest_timeout", "module:hypothesis")
    others = ("--ignore=tests/kernels", "--continue-on-collection-errors", "tests")
    return (
        Step(
            name="machine",
            command=("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
            limit=20,
            needs=("nvidia-smi",),
        ),
        Step(name="backends", command=python("-m", "esper_kernels.info"), limit=30),
        Step(
            name="active clusters", command=("sh", "-c", build), limit=60, needs=("device", "nvcc")
        ),
        Step(name="smoke test", command=python("-m", "benchmarks.gpu_session.smoke"), limit=120),
        Step(name="info --check", command=python("-m", "esper_kernels.info", "--check"), limit=60),
        Step(name="tests of kernels", command=(*pytest, "tests/kernels"), limit=170, needs=tests),
        Step(name="other tests", command=(*pytest, *others), limit=110, needs=tests),
    )


def speed() -> tuple[Step, ...]:
    code = (
        "import sys, pathlib, benchmarks.gpu as gpu; gpu.main([sys.argv[1]], "
        "pathlib.Path(sys.argv[2]))"
    )
    return tuple(
        Step(name=shape, command=python("-c", code, shape, "{folder}"), limit=58) for shape in SPEED
    )


def why() -> tuple[Step, ...]:
    launch = python("-m", "benchmarks.gpu_session.launch")
    sections = tuple(word for section in SECTIONS for word in ("--section", section))
    # The clocks stay as they are on a machine that is lent.
    ncu = ("ncu", "--clock-control", "none", "--profile-from-start", "off", *sections)
    profiled = [
        Step(
            name=f"ncu {backend} {shape}",
            command=(*ncu, *launch, backend, shape),
            limit=90,
            needs=("device", "ncu"),
        )
        for backend, shape in PROFILED
    ]
    sanitized = [
        Step(
            name=f"compute-sanitizer {tool}",
            command=(
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "1",
                *launch,
                "cuda",
                *SANITIZED,
            ),
            limit=100,
            needs=("device", "compute-sanitizer"),
            # Every tensor gets memory of its own, so that a read past its end is one past the
            # allocation's.
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ]
    return (*profiled, *sanitized)
