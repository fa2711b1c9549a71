"""The pages in docs/: their code runs, their reference is complete, and the site builds."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper_kernels
import esper_train
from tests.helpers.tokens import sequences, small_llama

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """The code of a page, each with what it prints: the text block right after it, or ""."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)


def integrations(directory: Path) -> dict[str, Any]:
    """The names that the examples on the page about trainers use without defining them."""
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


def kernels(directory: Path) -> dict[str, Any]:
    """The names that the examples on the page about kernels use without defining them; one process
    is all of its ranks."""
    store = dist.FileStore(str(directory / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    head = nn.Linear(4, 10)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(8, 4, requires_grad=True)
    batches = [(torch.randn(8, 10), torch.randint(10, (8,))) for _ in range(3)]
    public = {name: getattr(esper_kernels, name) for name in esper_kernels.__all__}
    return public | {
        "device": "cpu",
        "group": None,
        "tokens": None,
        "model": SimpleNamespace(features=lambda tokens: hidden),
        "head": head,
        "weight": head.weight,
        "meter": esper_kernels.Meter("cpu"),
        "batches": batches,
        "targets": batches[0][1],
        "actions": batches[0][1],
    }


PAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "integrations.md": integrations,
    "kernels.md": kernels,
    "tutorial.md": lambda directory: {},
}
"""Pages whose blocks run one after another, and the names that they take for granted."""
ELSEWHERE = {"training.md"}
"""Run by `tests/test_readme.py`."""


def test_every_page_with_code_is_run() -> None:
    pages = {path.name for path in DOCS.glob("*.md") if blocks(path.name)}
    assert pages == set(PAGES) | ELSEWHERE


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.slow  # the packages that the pages are about take seconds to import
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = PAGES[page](tmp_path) | {"__name__": "page"}
    found = blocks(page)
    assert found
    for number, (code, expected) in enumerate(found):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        if expected:
            assert printed.getvalue() == expected


@pytest.mark.parametrize("package", [esper_kernels, esper_train])
def test_the_reference_has_every_public_name(package: Any) -> None:
    name = package.__name__
    text = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    listed = re.findall(rf"^::: {name}\.(\w+)$", text, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert set(listed) == set(package.__all__) - {"__version__"}


def test_the_reference_has_every_integration() -> None:
    text = (DOCS / "reference" / "integrations.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: esper_kernels\.integrations\.(\w+)$", text, re.MULTILINE)
    modules = (ROOT / "esper_kernels" / "integrations").glob("[a-z]*.py")
    assert set(listed) == {path.stem for path in modules}


def test_the_tests_of_the_promises_exist() -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+|test_\w+)`", text)
    assert len(named) > 25
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    for name in named:
        exists = (ROOT / name).exists() or any(f"\ndef {name}(" in text for text in sources)
        assert exists, name


def test_the_error_messages_that_are_explained_exist() -> None:
    """The one that the page calls torch's own is left out."""
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"^## `(.*)`$", text, re.MULTILINE)
    messages.remove("has been modified by an inplace operation")
    assert len(messages) > 8
    constants = "\n".join(
        node.value
        for package in ("esper_kernels", "esper_train")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in constants, message


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link)[^>]* (?:src|href)=\"(https?:[^\"]*)\"", text)
        assert loaded == [], path
    reference = (tmp_path / "reference" / "esper_kernels.html").read_text()
    assert "class weights" in reference
