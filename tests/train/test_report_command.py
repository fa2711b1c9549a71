"""`esper-train report`: one run, several runs, a folder of runs, and nothing to report."""

import re
from pathlib import Path

import pytest

from esper_train import cli
from tests.helpers.command import QUICK, fails


def test_report_rewrites_a_page_and_compares_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert cli.main(["fit", *QUICK, "--out", name]) == 0
    Path("a/report.html").unlink()
    assert cli.main(["report", "a"]) == 0
    assert "synthetic, fit" in Path("a/report.html").read_text()
    assert cli.main(["report", "a", "b"]) == 0
    assert "Comparison of 2 runs" in Path("comparison.html").read_text()
    assert cli.main(["report", "a", "b", "--out", "other.html"]) == 0
    assert "report: other.html" in capsys.readouterr().out
    code, text = fails(capsys, "report", "a", "nowhere")
    assert (code, "no run in nowhere" in text) == (2, True)
    assert fails(capsys, "report")[0] == 2


def test_report_of_a_folder_compares_its_runs_and_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, options in (("one", ["--seed", "3"]), ("two", ["--optim.host-lr", "0.5"])):
        arguments = ["heuristic", *QUICK, *options, "--slots", "early", "--out", f"runs/{name}"]
        assert cli.main(arguments) == 0
    arguments = ["fit", *QUICK, "--episodes", "2", "--out", "runs/several"]
    assert cli.main(arguments) == 0
    assert cli.main(["report", "runs"]) == 0
    assert not Path("runs/report.html").exists()
    page = Path("comparison.html").read_text()
    table = page[page.index("Settings that differ") : page.index("<svg")]
    rows = [re.findall("<t[hd]>([^<]*)</t[hd]>", line) for line in table.splitlines()]
    runs = ["one", "several/episode-1", "several/episode-2", "two"]  # baselines are not among them
    assert [row for row in rows if row] == [
        ["", *(f"runs/{name}" for name in runs)],
        ["mode", "heuristic", "fit", "fit", "heuristic"],
        ["slots", "early", *["early, mid, late"] * 2, "early"],
        ["seed", "3", "42", "1042", "42"],
        ["optim.host_lr", "0.01", "0.01", "0.01", "0.5"],
    ]
    Path("runs/two/config.json").unlink()
    assert cli.main(["report", "runs/one", "runs/two"]) == 0
    assert "The settings of runs/two are not known." in Path("comparison.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no run in empty"),
        (["nowhere"], "no run in nowhere"),
        (["begun"], "nothing to report: begun/metrics.jsonl holds no run yet"),
        (["begun", "--out", "page.html"], "--out names a page that compares several runs"),
    ],
)
def test_a_report_of_nothing_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").touch()
    code, text = fails(capsys, "report", *arguments)
    assert code == 2
    assert message in text
    assert not list(tmp_path.rglob("*.html"))
