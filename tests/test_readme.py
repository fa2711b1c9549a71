"""README.md and docs/: their code runs, files and links exist, tables are the measured ones."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import pages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
IDS = [path.name for path in DOCUMENTS]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_loops_in_the_documents_run(page: str) -> None:
    """The first example of each; tests/train/run/test_own_life.py has the other of README.md."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
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


def tree() -> list[str]:
    """The paths of the README's file tree; an indented name belongs to the folder above it."""
    (block,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    paths = []
    folder = ""
    for line in block.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        if not line.startswith(" "):
            folder = names[0]
        paths += [f"{folder}{name}" if line.startswith(" ") else name for name in names]
    return paths


def test_the_file_tree_exists() -> None:
    assert len(tree()) > 15
    for path in tree():
        assert (ROOT / path).exists(), path


def test_the_file_tree_names_every_room() -> None:
    for package in ("esper_kernels/ops", "esper_train"):
        rooms = {
            f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob(f"{package}/*/__init__.py")
        }
        assert rooms <= set(tree())


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert not heading or heading in {title.lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z- ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = " ".join(targets).split()
    for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert name in targets, f"make {name}"


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_are_the_measured_ones(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.filled(text) == text, "python -m benchmarks pages writes them again"


def test_the_picture_shows_the_measured_figures() -> None:
    picture = pages.PICTURE.read_text(encoding="utf-8")
    shapes, factors = pages.speedups()
    values = [f"{value:.3g}x" for column in factors.values() for value in column]
    assert re.findall(r">(\d+(?:\.\d+)?x)<", picture) == values
    assert all(f">{shape}<" in picture for shape in shapes)
    assert len(picture) < 100 << 10


@pytest.mark.parametrize(("name", "lines"), [("README.md", 150), ("CONTRIBUTING.md", 60)])
def test_the_first_pages_are_short(name: str, lines: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < lines


def test_the_recipes_name_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:esper_\w+|csrc|tests|benchmarks|docs)/[\w/.]+)`", text)
    assert len(paths) > 15
    for path in paths:
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_recipes_name_tables_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(_?[A-Z][A-Z_]{2,})`", text))
    folders = ("esper_kernels", "esper_train", "benchmarks", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, ROOT / "setup.py"])
    assert names >= {"_MODULES", "_ORDER", "BACKENDS", "TASKS"}
    for name in names:
        assert re.search(rf"^{name}\b.* = ", code, re.MULTILINE), name
