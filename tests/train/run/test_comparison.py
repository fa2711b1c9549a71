"""Several runs compared on one page."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_train.run.report import write_comparison
from tests.helpers.reports import HOSTILE, Page, finished, fit, grown, write

pytest.importorskip("matplotlib")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("first", "second", "third")]
    for number, directory in enumerate(directories):
        write(directory, *(grown() if number else fit()), finished(test=90.0 + number))
    path = write_comparison(directories, tmp_path / "comparison.html")
    shown = Page(path.read_text(encoding="utf-8"))
    assert "Comparison of 3 runs" in shown.text
    assert shown.row("") == [str(directory) for directory in directories]
    assert shown.row("test accuracy") == ["91.75%", "91.00%", "92.00%"]
    assert shown.row("seeds fossilized") == ["0", "1", "1"]
    picture, decisions = shown.pictures.values()
    assert "first" in decisions
    for word in ("validation loss (nats)", "validation accuracy (%)", *map(str, directories)):
        assert word in picture
    assert not {"script", "link", "img", "image"} & set(shown.tags)


def test_comparison_escapes_names_and_names_what_holds_no_run(tmp_path: Path) -> None:
    hostile = tmp_path / HOSTILE.replace("/", "-")
    write(hostile, *grown())
    path = write_comparison([hostile, hostile], tmp_path / "page.html")
    shown = Page(path.read_text(encoding="utf-8"))
    assert shown.tags["script"] == 0
    assert str(hostile) in shown.text
    with pytest.raises(ValueError, match=r"no run in .*empty: metrics\.jsonl is missing"):
        write_comparison([hostile, tmp_path / "empty"], tmp_path / "page.html")
