"""Every program in examples/ runs, and says what it found."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGES = {"hf_trainer.py": "transformers", "lightning_digits.py": "lightning"}
"""What an example needs of the extras hf and lightning."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "early_stopping.py": ((), r"epoch \d+ of \d+: loss .* 9\d\.\d% right"),
    "own_loop.py": ((), r"epoch 5: loss .*, 9\d\.\d% right, (9\d\.\d|100\.0)% among"),
    "mixup.py": ((), r"loss .*; 9\d\.\d% of all and (9\d\.\d|100\.0)% of the nines"),
    "hf_trainer.py": ((), r"after 60 steps: validation loss \d\.\d+\n\d\d\.\d% of the bytes"),
    "lightning_digits.py": ((), r"validation accuracy 9\d\.\d%, training accuracy 9"),
    "torchrun_ddp.py": (TORCHRUN, r"epoch 5: 1078 rows, 9\d\.\d% right"),
    "torchrun_fsdp2.py": (TORCHRUN, r"epoch 5: 1078 rows, 9\d\.\d% right, last .* norm 0\.\d+"),
    "own_host.py": ((), r"test accuracy [4-9]\d\.\d% with \d+ parameters, \d seeds kept"),
    "learned_policy.py": ((), r"decisions: \{.*\}, test accuracy \d+\.\d%"),
}
"""What runs an example, besides Python, and what its output has to match."""


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    if find_spec(PACKAGES.get(name, "torch")) is None:
        pytest.skip("needs the extras hf and lightning")
    launcher, pattern = RUNS[name]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(pattern, done.stdout), done.stdout[-2000:]
