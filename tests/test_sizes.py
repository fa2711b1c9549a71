"""Limits on the length of files and functions: whatever is longer says why, at the top of its
file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("esper_kernels", "esper_train", "csrc", "benchmarks", "examples", "tests")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".inc")
MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60
"""Without the docstring."""


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [ROOT / "setup.py", *sorted(path for path in found if path.suffix in SUFFIXES)]


def head(path: Path, text: str) -> str:
    """The docstring of a module, or the comment with which a C++ file begins."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    return "\n".join(line.removeprefix("//").strip() for line in lines[:end])


def long_functions(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            documentation = len((ast.get_docstring(node, clean=False) or "").splitlines())
            if node.end_lineno - node.lineno + 1 - documentation > MOST_FUNCTION_LINES:
                yield node.name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_long_files_and_functions_say_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    reasons = head(path, text).lower()
    if len(text.splitlines()) > MOST_FILE_LINES:
        assert "long file" in reasons, f"over {MOST_FILE_LINES} lines: split it, or say why"
    if path.suffix == ".py" and (names := list(long_functions(text))):
        where = f"{names} over {MOST_FUNCTION_LINES} lines: split them, or say why"
        assert "long functions" in reasons, where


def test_a_reason_is_found_where_it_is_given() -> None:
    """The test itself, on made-up files."""
    long = "def f():\n" + "    pass\n" * 61
    assert list(long_functions(long)) == ["f"]
    documented = 'def f():\n    """One\n' + "    line\n" * 60 + '    """\n    return 1\n'
    assert list(long_functions(documented)) == []
    assert (
        "long file: it is"
        in head(Path("a.cu"), "// A kernel.\n//\n// Long file: it is\nint x;").lower()
    )
    assert head(Path("a.py"), "import ast\n# Long file: too late") == ""
