"""The benchmarks of growing: what they make of what they measured."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate, growth, record, seed_cost
from benchmarks.gate import Course, Measured
from esper_train import Event, EventType, GrowthConfig, SeedStage

GATE = GrowthConfig(window=2, training_min_epochs=2, blending_potential=0.5)


@pytest.mark.parametrize(
    ("later", "epochs"),
    [
        ([], 0),
        ([87.0, 87.0], 0),  # 3 points below 90 are not more than 3
        ([86.9, 87.0, 86.9, 86.9], 2),
        ([95.0, 80.0, 80.0, 80.0], 3),
    ],
)
def test_longest_harm_counts_epochs_in_a_row(later: list[float], epochs: int) -> None:
    before = [10.0, 89.0, 91.0]
    assert growth.longest_harm([*before, *later], [3], window=2, points=3.0) == epochs


def test_longest_harm_is_that_of_the_worst_blending() -> None:
    accuracies = [90.0, 80.0, 90.0, 70.0, 70.0]
    assert growth.longest_harm(accuracies, [], window=1, points=3.0) == 0
    assert growth.longest_harm(accuracies, [1], window=1, points=3.0) == 2
    assert growth.longest_harm(accuracies, [2], window=1, points=3.0) == 2
    assert growth.longest_harm(accuracies, [1, 3], window=1, points=3.0) == 2


def test_a_watch_keeps_accuracies_and_the_epochs_in_which_blending_began() -> None:
    watch = growth.Watch()
    watch.write(Event(EventType.EPOCH, 1, {"validation": {"accuracy": 50.0}}))
    watch.write(Event(EventType.SEED_STAGE, 1, {"stage": "TRAINING"}))
    watch.write(Event(EventType.SEED_STAGE, 2, {"stage": SeedStage.BLENDING.name}))
    watch.close()
    assert watch.accuracies == [50.0]
    assert watch.blended == [2]


def pair(epochs: int, seed: int, grown: float) -> growth.Pair:
    return growth.Pair(
        epochs=epochs,
        seed=seed,
        grown=grown,
        fit=95.0,
        parameters=10,
        fossils=1,
        undone=2,
        undone_epochs=9,
        harm=seed,
        harm_fit=2,
    )


def test_the_growth_table_has_means_and_the_worst_of_each_length() -> None:
    figures = [asdict(pair(75, 0, 96.0)), asdict(pair(75, 1, 92.0)), asdict(pair(150, 0, 95.0))]
    rows = growth.table(figures).splitlines()[2:]
    assert rows == [
        "| 75 | 2 | 94.00 | 95.00 | -1.00 ± 2.00 | 1 / 1 | 2 | 4 | 1 | 2 |",
        "| 150 | 1 | 95.00 | 95.00 | +0.00 ± nan | 0 / 0 | 1 | 2 | 0 | 2 |",
    ]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record.write, "__defaults__", (tmp_path,))
    return tmp_path


def test_growth_goes_on_where_the_same_commit_stopped(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def measure(task: str, epochs: int, seed: int) -> growth.Pair:
        asked.append((epochs, seed))
        return pair(epochs, seed, 96.0)

    monkeypatch.setattr(growth, "measure", measure)
    monkeypatch.setattr("sys.argv", ["growth", "--seeds", "2", "--epochs", "5"])
    growth.main()
    monkeypatch.setattr("sys.argv", ["growth", "--seeds", "3", "--epochs", "5"])
    growth.main()
    assert asked == [(5, 0), (5, 1), (5, 2)]
    path = results / "growth-digits.json"
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert [row["seed"] for row in written["figures"]] == [0, 1, 2]
    written["environment"]["commit"] = "another"
    path.write_text(json.dumps(written), encoding="utf-8")
    assert growth.measured_before("growth-digits") == []


def course(*epochs: tuple[float, float, float]) -> Course:
    measured = tuple(
        Measured(potential=potential, potential_loss=loss, test_gain=gain)
        for potential, loss, gain in epochs
    )
    return Course(slot="early", seed=0, blueprint="norm", epochs=measured)


@pytest.mark.parametrize(
    ("found", "gain"),
    [
        (course(), None),
        (course((1.0, -0.1, 7.0)), None),  # one epoch of two
        (course((1.0, -0.1, 7.0), (1.0, -0.1, 8.0), (1.0, -0.1, 9.0)), 8.0),
        (course((-1.0, -0.1, 7.0), (1.0, -0.1, 8.0), (1.0, -0.1, 9.0)), 9.0),
        (course((1.0, 0.2, 7.0), (1.0, 0.1, 8.0)), None),  # the loss rises
    ],
)
def test_the_gain_is_that_of_the_first_epoch_in_which_the_gate_passes(
    found: Course, gain: float | None
) -> None:
    assert found.gain_on_passing(GATE) == gain


def test_no_seed_passes_after_its_time() -> None:
    late = course(*[(0.0, 0.0, 1.0)] * 4, (9.0, -0.1, 2.0))
    assert late.gain_on_passing(replace(GATE, training_timeout=5)) == 2.0
    assert late.gain_on_passing(replace(GATE, training_timeout=4)) is None


def test_the_gate_table_reads_what_was_written() -> None:
    figures = [asdict(course(*[(0.2, -0.1, gain)] * 5)) for gain in (1.0, 2.0)]
    plain = json.loads(json.dumps(figures))
    rows = [line.split(" | ") for line in gate.table(plain).splitlines()[2:]]
    assert rows[0] == ["| -1", "0.05", "2 of 2", "+1.50 ± 0.50 |"]
    assert rows[-1][2:] == ["0 of 2", " |"]


@pytest.mark.slow
def test_the_cost_of_a_seed_is_measured_both_ways() -> None:
    row = seed_cost.measure("digits, width 8", "late", rounds=1)
    assert row["seconds"] > 0
    assert row["seconds_with_seed"] > 0
    assert 1 < row["multiply_adds"] < 2
    assert "digits, width 8" in seed_cost.table([row])
