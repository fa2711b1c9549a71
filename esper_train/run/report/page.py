"""One HTML page that opens offline: its frame, tags, tables and numbers in words. `tag` escapes the
text."""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from esper_train.run.directory import write_file

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{title}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: auto; padding: 1rem }}
h1, p {{ overflow-wrap: anywhere }}
svg {{ display: block; width: 100%; max-width: 100%; height: auto; background: #fff }}
div > svg {{ min-width: 40rem }}
div {{ overflow-x: auto; margin: .5rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #8888 }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    page = PAGE.format(title=tag("title", title), body="\n".join([tag("h1", title), *parts]))
    write_file(path, page.encode())
    return path


def tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def table(rows: Iterable[Iterable[str]]) -> str:
    """An HTML table; the first row is its header."""
    lines = ["".join(tag("td" if i else "th", cell) for cell in row) for i, row in enumerate(rows)]
    return "<div><table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def show(value: float | None, form: str, unit: str = "", *, none: str = "not measured") -> str:
    return none if value is None or math.isnan(value) else f"{value:{form}}{unit}"
