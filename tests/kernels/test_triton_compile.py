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


COMPILE = """
import itertools, json, sys
from benchmarks.triton_resources import TARGETS, VARIANTS, resources

share = int(sys.argv[1])
variants = itertools.chain.from_iterable(variants() for variants in VARIANTS)
rows = [
    resources(variant, target)
    for i, variant in enumerate(variants)
    for j, target in enumerate(TARGETS)
    if i % share == j % share
]
print(json.dumps(rows))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "share",
    [
        pytest.param(3, marks=pytest.mark.slow, id="each variant for one GPU"),
        pytest.param(1, marks=pytest.mark.long, id="each variant for every GPU"),
    ],
)
def test_every_variant_compiles_without_a_spill(share: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(share)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spilled_bytes"] == 0, row
    figures = json.loads((ROOT / "benchmarks/results/triton-resources.json").read_text())["figures"]
    recorded = {(row["variant"], row["sm"]) for row in figures}
    compiled = {(row["variant"], row["sm"]) for row in rows}
    assert {sm for _, sm in compiled} == {sm for _, sm in recorded} == {80, 90, 100}
    assert {variant for variant, _ in compiled} == {variant for variant, _ in recorded}
    assert compiled <= recorded


def test_gradient_statistics_of_every_list_are_one_binary() -> None:
    """Triton binds the arguments to the same specialization for any list."""
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
