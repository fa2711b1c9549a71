"""`python -m benchmarks`: every benchmark is listed and runs, and results say where they come
from."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import before, pages, record

NAMES = sorted(command.benchmarks())


def test_every_benchmark_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    for name, summary in command.benchmarks().items():
        assert summary.endswith(".")
        assert any(line.split() == [name, *summary.split()] for line in lines)
    assert {"cpu", "epoch", "gpu", "growth"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_benchmark_does_nothing_when_it_is_run(name: str) -> None:
    folder = command.FOLDER / name
    path = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
    guards = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]
    assert len(guards) == 1
    assert any(isinstance(node, ast.Call) for node in ast.walk(guards[0]))


@pytest.mark.parametrize(
    "module",
    ["benchmarks", pytest.param("benchmarks.compiled_steps", marks=pytest.mark.slow)],
)
def test_both_ways_to_run_one_give_its_help(module: str) -> None:
    name = ["compiled_steps"] if module == "benchmarks" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *name, "--help"],
        capture_output=True,
        text=True,
        cwd=command.FOLDER.parent,
        check=True,
    )
    assert done.stdout.startswith("usage: python -m benchmarks compiled_steps [-h]")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SystemExit, match=r"no benchmark 'epochs'; did you mean 'epoch'\?\n"):
        command.main(["epochs"])


def test_results_say_where_and_with_what_they_were_measured(tmp_path: Path) -> None:
    path = record.write("figures", [1.5], tmp_path / "new")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["figures"] == [1.5]
    environment = found["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["cpu"]
    assert {"date", "machine", "cores", "threads", "python", "commit"} <= set(environment)


def test_numbers_of_tables_have_three_digits_and_no_exponent() -> None:
    values = (21800.4, 0.07196, 1.0, 999.6, 1234567.0, 0.0)
    assert [*map(record.short, values)] == ["21,800", "0.072", "1", "1,000", "1,230,000", "0"]


def test_a_page_with_an_unknown_table_is_refused() -> None:
    assert pages.filled("before\nafter") == "before\nafter"
    with pytest.raises(ValueError, match="no table 'nothing'; there are cpu in short"):
        pages.filled("<!-- nothing -->\n<!-- end of nothing -->")


def test_checkouts_are_compared_by_the_median_of_the_ratios_of_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = iter([{"step": [(1.0, 2.0), (4.0, 8.0)]}, {"step": [(10.0, 5.0)]}])
    monkeypatch.setattr(before, "times_of", lambda *arguments: next(pairs))
    (row,) = before.measure("8x10", command.FOLDER.parent, pairs=2)
    assert (row["before"], row["now"], row["ratio"]) == (4.0, 5.0, 2.0)


@pytest.mark.slow
def test_two_checkouts_are_measured_in_turn(tmp_path: Path) -> None:
    times = before.times_of("8x10", command.FOLDER.parent, rounds=2)
    assert {call: len(pairs) for call, pairs in times.items()} == {"step": 2, "loss only": 2}
    assert min(seconds for pairs in times.values() for pair in pairs for seconds in pair) > 0
    with pytest.raises(SystemExit, match="holds no esper_kernels: those of"):
        before.times_of("8x10", tmp_path, rounds=1)
