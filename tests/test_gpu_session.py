"""The session on a GPU, as far as it runs without one: limits, skips, results, comparison."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_session import __main__ as session
from benchmarks.gpu_session import smoke, steps
from benchmarks.gpu_session.steps import Step

PART_SECONDS = 600


def step(name: str, code: str, limit: int = 60, needs: tuple[str, ...] = ()) -> Step:
    return Step(
        name=name, command=(sys.executable, "-c", code, "{folder}"), limit=limit, needs=needs
    )


def test_a_part_takes_at_most_ten_minutes() -> None:
    parts = steps.parts()
    assert list(parts) == ["correct", "speed", "why"]
    for part in parts.values():
        assert sum(step.limit for step in part) < PART_SECONDS
        assert len({step.name for step in part}) == len(part)


def test_without_a_device_every_step_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for part in steps.parts().values():
        for skipped in (session.run(step, io.StringIO()) for step in part):
            assert skipped["result"] == "skipped"
            assert skipped["reason"].startswith(
                ("torch finds no CUDA device", "there is no nvidia-smi")
            )


def test_results_are_on_disk_after_every_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = tmp_path / "out" / "try.json"
    figures = "import sys, pathlib; pathlib.Path(sys.argv[1], 'made.json').write_text('[1, 2]')"
    todo = (
        step("leaves figures", figures),
        step(
            "sees the step before",
            f"import json; assert len(json.load(open({str(seen)!r}))['figures']) == 1",
        ),
        step("fails", "import sys; print('what went wrong'); sys.exit(3)"),
        step("hangs", "import time; time.sleep(1000)", limit=1),
        step("lacks a program", "", needs=("no-such-program", "module:no_such_module")),
    )
    monkeypatch.setattr(session, "parts", lambda: {"try": todo})
    assert not session.run_part("try", tmp_path / "out")
    found = json.loads(seen.read_text())["figures"]
    assert [row["result"] for row in found] == [
        "passed",
        "passed",
        "failed (exit code 3)",
        "out of time",
        "skipped",
    ]
    assert found[0]["figures"] == {"made": [1, 2]}
    assert (
        found[4]["reason"]
        == "there is no no-such-program; Python module no_such_module is not installed"
    )
    assert "what went wrong" in (tmp_path / "out" / "try.log").read_text()


def test_results_go_where_the_machine_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session, "parts", lambda: {"try": ()})
    monkeypatch.setenv("OUT", str(tmp_path / "there"))
    with pytest.raises(SystemExit, match="0"):
        session.main(["try"])
    assert (tmp_path / "there" / "try.log").exists()
    for names in ([], ["speeed"]):
        with pytest.raises(SystemExit, match=r"usage: python -m benchmarks gpu_session \{try\}"):
            session.main(names)


@pytest.mark.parametrize("dtype", smoke.DTYPES, ids=str)
def test_the_smoke_test_passes_what_is_right(dtype: torch.dtype) -> None:
    for backend in ("eager", "cpp"):
        smoke.compare(*smoke.sample("cpu", dtype, 9, 37), backend, repeats=3, replays=0)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("gradient", "relative error"),
        ("count", "counts differ from eager"),
        ("one repeat", "1 of 5 repeats gave other bits"),
    ],
)
def test_the_smoke_test_finds_what_is_wrong(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = smoke.cross_entropy_step
    calls = 0

    def wrong(logits, targets, meter, *, out=None, config):  # type: ignore[no-untyped-def]
        nonlocal calls
        gradient = right(logits, targets, meter, out=out, config=config)
        if config is not smoke.EAGER:
            calls += 1
            if fault == "gradient":
                gradient.mul_(1.01)
            elif fault == "count":
                meter.counts.add_(1)
            elif calls == 4:
                gradient.view(smoke.WORDS[4])[0, 0] ^= 1
        return gradient

    monkeypatch.setattr(smoke, "cross_entropy_step", wrong)
    with pytest.raises(AssertionError, match=words):
        smoke.compare(*smoke.sample("cpu", torch.float32, 9, 37), "cpp", repeats=5, replays=0)
