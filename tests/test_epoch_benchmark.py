"""benchmarks/epoch.py times only loops that do the same work."""

import pytest

from benchmarks import epoch

pytestmark = pytest.mark.slow


def test_a_case_has_every_figure() -> None:
    row = epoch.measure("tiny", rounds=2)
    assert set(row["seconds"]) == {
        "plain",
        "plain, DataLoader",
        "ours",
        "ours, bfloat16",
        "ours, compiled",
    }
    assert all(value > 0 for value in row["seconds"].values())
    assert row["batches"] == 4
    assert {"us per batch", "us by hand", "us per epoch", "us of a read"} < set(row["loop"])
    assert set(row["evaluation"]) == {"over one pass", "ideal"}
    line = epoch.table([row]).splitlines()[-1]
    assert line.startswith("| tiny")
    assert line.count("|") == epoch.table([row]).splitlines()[0].count("|")


def test_loops_that_train_differently_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = epoch.plain_loss
    monkeypatch.setattr(epoch, "plain_loss", lambda logits, targets: 2 * plain(logits, targets))
    with pytest.raises(SystemExit, match="tiny: losses differ, so nothing is timed"):
        epoch.measure("tiny", rounds=1)
