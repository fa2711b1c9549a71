"""The code of the pages in docs/ runs: all blocks of a page, one after another."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.tokens import sequences, small_llama

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.slow  # the packages that the pages are about take seconds to import


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def integrations(directory: Path) -> dict[str, Any]:
    """What the page on trainers takes for granted."""
    for package in ("transformers", "accelerate", "lightning", "torchmetrics"):
        pytest.importorskip(package, reason="needs the extras hf and lightning")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 4), torch.randint(3, (32,)))
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    shape = (2, 5)
    return {
        "torch": torch,
        "model": small_llama(),
        "dataset": sequences(24),
        "out": str(directory / "out"),
        "network": nn.Linear(4, 3),
        "loader": DataLoader(data, batch_size=8),
        "quiet": quiet,
        "logits": torch.randn(*shape, 7, requires_grad=True),
        "actions": torch.randint(7, shape),
        "old": torch.full(shape, -2.0),
        "advantages": torch.randn(shape),
        "mask": torch.ones(shape),
    }


PAGES: dict[str, Callable[[Path], dict[str, Any]]] = {"integrations.md": integrations}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = PAGES[page](tmp_path) | {"__name__": "page"}
    found = blocks(page)
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
