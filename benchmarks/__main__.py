"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME [options]` runs one.

A benchmark is a module of this folder that runs its `main` when it is executed, so
`python -m benchmarks.NAME` does the same. The first line of its docstring is its line in the list.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# no benchmarks themselves
SHARED = {
    "__init__",
    "__main__",
    "record",
    "timing",
    "before_calls",
    "epoch_cases",
    "gpu_timing",
    "growth_runs",
    "tabular",
}


def benchmarks() -> dict[str, str]:
    """The subject of each benchmark by its name, found without importing any of them."""
    modules = {path.stem: path for path in FOLDER.glob("*.py") if path.stem not in SHARED}
    packages = {path.parent.name: path for path in FOLDER.glob("*/__main__.py")}
    found = {}
    for name, path in sorted({**modules, **packages}.items()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[name] = docstring.partition("\n")[0]
    return found


def listing() -> str:
    """The usage and one line for each benchmark."""
    found = benchmarks()
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {line}" for name, line in found.items()]
    usage = [
        "usage: python -m benchmarks NAME [options]",
        "       python -m benchmarks NAME --help",
    ]
    return "\n".join([*usage, "", *lines])


def main(arguments: list[str]) -> None:
    """Run the benchmark that the first argument names, with the other arguments as its own."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return
    name, *options = arguments
    if name not in benchmarks():
        near = difflib.get_close_matches(name, benchmarks(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        sys.exit(f"there is no benchmark {name!r}{hint}\n\n{listing()}")
    sys.argv = [f"python -m benchmarks {name}", *options]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
