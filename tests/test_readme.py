"""What the README says must work: its Python runs, its files exist, its table is the measured one."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import growth

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["kernels", "loop"])
def test_python_of_the_readme_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 6)
    batches = [(torch.randn(8, 4), torch.randint(6, (8,))) for _ in range(3)]
    names = {
        "device": "cpu",
        "model": model,
        "loader": batches,
        "other_loader": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(code, names)
    measured = names.get("result", names.get("held_out"))
    assert measured.valid == 24  # type: ignore[attr-defined]


def test_every_file_the_index_names_exists() -> None:
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            path = name if "/" in name.rstrip("/") or (ROOT / name).exists() else f"{folder}/{name}"
            folder = str(Path(path).parent)
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("task", ["digits", "pysource"])
def test_the_tables_are_the_measured_ones(task: str) -> None:
    figures = json.loads((ROOT / f"benchmarks/results/growth-{task}.json").read_text())["figures"]
    assert growth.table(figures) in README
