"""The parts of a release that must agree: its version, its changes and its citation."""

import re
import tomllib
from pathlib import Path

import yaml

from esper_kernels import __version__

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {project["version"], str(citation["version"])} == {__version__}


def test_the_changelog_has_the_version_below_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert titles[:2] == ["Unreleased", __version__]


def test_the_citation_has_what_the_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all("name" in author for author in citation["authors"])
