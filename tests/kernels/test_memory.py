"""Memory that a call of the compiled CPU backend allocates, seen by limiting the process's address
space."""

import os
import subprocess
import sys

import pytest

# In a process of its own. Blocks of 64 KiB and more are mapped one by one, so that each counts; the
# heap that is already there holds smaller ones only.
CODE = """
import resource, sys
import torch
from esper_kernels import KernelConfig, Meter, cross_entropy_step

rows, classes, threads = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
dtype, form = sys.argv[3:5]
torch.set_num_threads(threads)
config, meter = KernelConfig(backend="cpp"), Meter("cpu", topk=(1, 5))
options = {"label_smoothing": 0.1, "softcap": 30.0} if form == "options" else {}

def call(logits, targets, **memory):
    cross_entropy_step(logits, targets, meter, **memory, **options, config=config)

# starts the threads
call(torch.zeros(4096, 40), torch.zeros(4096, dtype=torch.int64), inplace=True)
logits = torch.ones(rows, classes, dtype=getattr(torch, dtype))
targets = torch.zeros(rows, dtype=torch.int64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)
call(logits, targets, **({} if form == "fresh" else {"inplace": True}))
print(meter.compute().valid)
"""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_ARENA_MAX": "1"}


def run(
    rows: int, classes: int, dtype: str, form: str, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    if not sys.platform.startswith("linux"):
        pytest.skip("the address space is limited and read as on Linux")
    arguments = [str(x) for x in (rows, classes, dtype, form, threads)]
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "form", "threads"),
    [
        (512, 32768, "float32", "inplace", 1),
        (512, 32768, "float32", "options", 2),
        pytest.param(1_600_000, 10, "float32", "inplace", 1, marks=pytest.mark.slow),
        pytest.param(16, 1_000_003, "float32", "inplace", 2, marks=pytest.mark.slow),
        pytest.param(16_000, 2048, "bfloat16", "options", 1, marks=pytest.mark.slow),
    ],
)
def test_inplace_needs_less_than_a_mebibyte(
    rows: int, classes: int, dtype: str, form: str, threads: int
) -> None:
    """64 MB of logits; `inplace` is the plain loss, `options` one that keeps the logits for a
    second look."""
    done = run(rows, classes, dtype, form, threads)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(rows + 4096)]


def test_a_fresh_gradient_needs_more() -> None:
    """The limit works: what allocates a gradient exceeds it."""
    done = run(512, 32768, "float32", "fresh")
    assert done.returncode != 0
    assert "can't allocate memory" in done.stderr
