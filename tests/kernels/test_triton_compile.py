"""Every Triton kernel that a launch can select compiles for real GPUs, here, and keeps its numbers in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_variant_compiles_without_a_spill(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    code = "import json; from benchmarks import triton_resources; print(json.dumps(triton_resources.measure()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["sm"] for row in rows} == {80, 90, 100}
    assert len({row["variant"] for row in rows if row["variant"].startswith("grad_stats")}) == 5
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spilled_bytes"] == 0, row
    recorded = json.loads((ROOT / "benchmarks/results/triton-resources.json").read_text())["figures"]
    assert {(row["variant"], row["sm"]) for row in recorded} == {(row["variant"], row["sm"]) for row in rows}
