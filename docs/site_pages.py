"""The pages of the site that are not in docs/: those at the root of the tree, and the examples.

mkdocs calls the functions `on_...`. Links that lead out of docs/ become links to these pages.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
EXAMPLES = "examples.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, EXAMPLES, content=examples()))
    return files


def examples() -> str:
    """A page of all examples: what each says of itself, and its code."""
    parts = ["# Examples\n\nEach runs on a CPU within a minute, in `tests/test_examples.py`."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        title, _, rest = (ast.get_docstring(ast.parse(code)) or "").partition("\n")
        usage = "\n".join(f"    {line}" for line in rest.strip().splitlines())
        body = code[code.index('"""', 3) + 3 :].strip()
        parts.append(f"## {path.stem}\n\n{title}\n\n{usage}\n\n```python\n{body}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    at_root = page.file.src_uri in PAGES.values()
    return re.sub(r"\]\(([^)#]+)(#[^)]*)?\)", lambda m: _link(m[1], m[2] or "", at_root), markdown)


def _link(path: str, heading: str, at_root: bool) -> str:
    """The link as the site has it, for one that is right in the tree."""
    inside = path.removeprefix("docs/") if at_root else path
    source = path.removeprefix("../")
    if source in PAGES:
        inside = PAGES[source]
    elif source.startswith("examples/"):
        inside, heading = EXAMPLES, f"#{Path(source).stem}"
    return f"]({inside}{heading})"
