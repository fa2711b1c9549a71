"""Every Triton kernel that a launch can select compiles for real GPUs without spilling
registers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.covering import covering, triples

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


COMPILE = """
import itertools, json, sys
from benchmarks.triton_resources import TARGETS, VARIANTS, resources
from tests.helpers.covering import covering

variants = {v.name: v for v in itertools.chain.from_iterable(each() for each in VARIANTS)}
if sys.argv[1] == "all":
    plan = itertools.product(variants, TARGETS)
else:
    plan = zip(covering(list(variants)), itertools.cycle(TARGETS))
print(json.dumps([resources(variants[name], target) for name, target in plan]))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "which",
    [
        pytest.param("covering", marks=pytest.mark.slow, id="those that cover all, for one GPU"),
        pytest.param("all", marks=pytest.mark.long, id="each variant for every GPU"),
    ],
)
def test_every_variant_compiles_without_a_spill(which: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, which]
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
    if which == "all":
        assert compiled == recorded
    else:
        assert compiled <= recorded
        names = [{variant for variant, _ in each} for each in (compiled, recorded)]
        assert triples(sorted(names[0])) == triples(sorted(names[1]))


def test_any_three_properties_of_a_variant_are_compiled_together() -> None:
    values = (("10", "1000"), ("half", "single"), ("plain", "heavy"), ("step", "measured, all"))
    names = [", ".join(("op", *each)) for each in itertools.product(*values)]
    chosen = covering(names)
    assert len(chosen) < len(names) == 16
    for some in itertools.combinations(values, 3):
        for three in itertools.product(*some):
            assert any(all(word in name for word in three) for name in chosen), three
    assert covering(["a", "a, b"]) == ["a", "a, b"]


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
