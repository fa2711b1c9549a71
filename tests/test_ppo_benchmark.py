"""The comparison of controllers: its intervals and its tables."""

from dataclasses import asdict, replace

import pytest

from benchmarks import hosts, ppo
from benchmarks.ppo import Episode


def episode(controller: str, seed: int, reward: float) -> Episode:
    return Episode(
        controller=controller,
        seed=seed,
        reward=reward,
        accuracy=90.0 + reward,
        parameters=1009,
        cost=40.0,
        fossils=1,
        decisions={"WAIT": 40},
    )


def test_an_interval_covers_the_mean_and_shrinks_with_equal_differences() -> None:
    low, high = ppo.interval([1.0, 2.0, 3.0, 4.0])
    assert 1.0 <= low < 2.5 < high <= 4.0
    assert ppo.interval([0.5] * 20) == (0.5, 0.5)


def test_an_interval_is_that_of_the_normal_distribution_for_many_differences() -> None:
    """There are 400 differences, half 0 and half 1: mean 0.5, standard error 0.5 / 20."""
    low, high = ppo.interval([0.0, 1.0] * 200, samples=2000)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_the_tables_pair_the_controllers_by_seed() -> None:
    rows = [episode("learned", seed, 2.0 + seed) for seed in (1, 0)]
    rows += [episode("never", seed, 1.0 + seed) for seed in (0, 1)]
    figures = {"episodes": [asdict(row) for row in rows], "progress": []}
    means, gains = ppo.table(figures).split("\n\n")
    assert means.splitlines()[2:] == [
        "| learned | 2.50 | 92.50 | 1,009 | 40.0 | 1.00 |",
        "| never | 1.50 | 91.50 | 1,009 | 40.0 | 1.00 |",
    ]
    gain = "+1.00 (+1.00 to +1.00)"
    assert gains.splitlines()[2:] == [f"| never | {gain} | {gain} | +0.00 (+0.00 to +0.00) |"]


def test_the_curve_has_every_fourth_update_and_the_evaluations() -> None:
    measured = {"return": 2.25, "accuracy": 95.0, "cost": 41.0}
    lines = [
        {"update": update, "steps": 320 * update, "return": 1.5, "evaluation": None}
        for update in (3, 4, 5)
    ]
    lines.append({"update": 10, "steps": 3200, "return": 1.75, "evaluation": measured})
    assert ppo.curve({"progress": lines}).splitlines()[2:] == [
        "| 1,280 | 1.50 |  |  |  |",
        "| 3,200 | 1.75 | 2.25 | 95.00 | 41.0 |",
    ]


def test_held_out_seeds_are_no_seeds_of_training() -> None:
    config = ppo.config_of_training(10**6)
    first = config.seed - config.rl.evaluations
    assert max(ppo.HELD_OUT) < first


def test_every_controller_grows_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.rl.test_learned import made

    config = replace(ppo.config_of_training(1), task="synthetic", max_epochs=2, max_batches=1)
    monkeypatch.setattr(ppo, "HELD_OUT", range(2))
    found = ppo.measure(config, made(config)[1], say=lambda words: None)
    names = [(row["controller"], row["seed"]) for row in found]
    order = ("learned", "heuristic", "random", "never")
    assert names == [(name, seed) for seed in (0, 1) for name in order]
    assert all(sum(row["decisions"].values()) == 2 for row in found)
    never = [row for row in found if row["controller"] == "never"]
    assert [(row["fossils"], row["cost"]) for row in never] == [(0, 2.0)] * 2


def test_the_table_of_hosts_has_a_row_for_each_number() -> None:
    figures = [{"hosts": 1, "one process": 10.04, "processes": 9.0}]
    assert hosts.table(figures).splitlines()[2:] == ["| 1 | 10.0 | 9.0 |"]
