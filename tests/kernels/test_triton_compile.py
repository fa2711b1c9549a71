"""Every Triton kernel that a launch can select compiles for real GPUs without spilling
registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_variant_compiles_without_a_spill(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    code = (
        "import json; from benchmarks import triton_resources; "
        "print(json.dumps(triton_resources.measure()))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["sm"] for row in rows} == {80, 90, 100}
    assert {row["variant"].partition(",")[0] for row in rows} == {
        "grad_stats",
        "cross_entropy",
        "token_logprobs",
    }
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spilled_bytes"] == 0, row
    recorded = json.loads((ROOT / "benchmarks/results/triton-resources.json").read_text())[
        "figures"
    ]
    assert {(row["variant"], row["sm"]) for row in recorded} == {
        (row["variant"], row["sm"]) for row in rows
    }


def test_gradient_statistics_of_every_list_are_one_binary() -> None:
    """What a launch is specialized on, as Triton binds its arguments, is the same for any list."""
    code = """
import torch
from benchmarks.triton_resources import grad_stats_variants, recorded
from esper_kernels import grad_stats
from esper_kernels.ops.grad_stats import triton

compiled = next(grad_stats_variants())
for sizes in ([1], [16] * 16, [3] * 17, [10_000_000, 1]):
    tensors = [torch.ones(size, dtype=triton.DTYPES[size % 4]) for size in sizes]
    (launched,) = recorded(compiled.name, lambda: triton.fill(tensors, None, grad_stats(tensors)))
    assert launched[1:] == compiled[1:], (launched, compiled)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
