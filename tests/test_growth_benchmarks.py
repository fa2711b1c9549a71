"""The benchmarks of growing: what they make of what they measured."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gate, growth, growth_runs, growth_variants, record, seed_cost
from benchmarks.gate import Course, Measured
from benchmarks.growth_runs import longest_harm
from esper_train import Event, EventType, GrowthConfig, HeuristicConfig, Op, RunConfig, SeedStage
from esper_train.run.run import prepare
from esper_train.tasks import load_splits

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
    assert longest_harm([*before, *later], [3], window=2, points=3.0) == epochs


def test_longest_harm_is_that_of_the_worst_blending() -> None:
    accuracies = [90.0, 80.0, 90.0, 70.0, 70.0]
    assert longest_harm(accuracies, [], window=1, points=3.0) == 0
    assert longest_harm(accuracies, [1], window=1, points=3.0) == 2
    assert longest_harm(accuracies, [2], window=1, points=3.0) == 2
    assert longest_harm(accuracies, [1, 3], window=1, points=3.0) == 2


def test_a_watch_keeps_accuracies_evaluations_and_when_blending_began() -> None:
    watch = growth_runs.Watch()
    for accuracy, passes in ((50.0, 1), (60.0, 3)):
        data = {"validation": {"accuracy": accuracy}, "passes": passes}
        watch.write(Event(EventType.EPOCH, 1, data))
    watch.write(Event(EventType.SEED_STAGE, 1, {"stage": "TRAINING"}))
    watch.write(Event(EventType.SEED_STAGE, 2, {"stage": SeedStage.BLENDING.name}))
    watch.close()
    assert watch.accuracies == [50.0, 60.0]
    assert watch.evaluations == 4
    assert watch.blended == [2]


def test_a_curve_has_the_last_value_that_was_paid_for() -> None:
    found = growth_runs.stepped([4.0, 8.0, 10.0], [1.0, 2.0, 3.0], 10.0)
    assert found == [1.0] * 15 + [2.0] * 4 + [3.0]  # in steps of half an epoch
    assert growth_runs.stepped([0.3] * 1, [7.0], 0.3) == [7.0] * 20


def test_a_run_is_drawn_with_the_network_that_it_would_give() -> None:
    """After the second epoch it would give the first one's network, and none before any is kept."""
    result: Any = SimpleNamespace(kept_epoch=3)
    watch = growth_runs.Watch(
        accuracies=[50.0, 40.0, 60.0], costs=[10.0, 20.0, 40.0], kept=[0, 0, 1]
    )
    run = growth_runs.Run(result=result, watch=watch, step=1)
    assert run.curve(40.0) == [50.0] * 19 + [60.0]
    assert run.curve(80.0, unit=2.0) == run.curve(40.0)


def row(epochs: int, seed: int, grown: float) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "seed": seed,
        "grown": grown,
        "host": 94.0,
        "static": 97.0,
        "host_equal": 95.0,
        "static_equal": 96.0,
        "parameters": 1500 + seed,
        "host_parameters": 1000,
        "cost": 1.5 * epochs,
        "unit": 2.0,
        "evaluations": 2 * epochs,
        "fossils": 1,
        "undone": 2,
        "undone_epochs": 15,
        "harm": seed,
        "harm_host": 2,
        "curves": {"grown": [1.0 + seed], "host": [2.0], "static": [3.0 * seed]},
    }


FIGURES = [row(150, 0, 95.0), row(75, 0, 96.0), row(75, 1, 92.0)]


def test_the_growth_tables_have_means_and_paired_differences_of_each_length() -> None:
    assert " ".join(growth.in_short(FIGURES).splitlines()) == (
        "At equal training cost, the test accuracy of grown networks minus that of static networks "
        "of their final size is -2.00 ± 2.00 points in runs of 75 epochs (2 seeds), -1.00 "
        "points in runs of 150 epochs (1 seed). Minus that of their hosts, it is -1.00 ± 2.00 "
        "points in runs of 75 epochs (2 seeds), +0.00 points in runs of 150 epochs (1 seed)."
    )
    accuracies, differences, fates = growth.table(FIGURES).split("\n\n")
    assert accuracies.splitlines()[2] == (
        "| 75 | 2 | 1,000 to 1,500 | 1.50 | 2.00 | 94.00 ± 2.00 | 94.00 ± 0.00 | 97.00 ± 0.00 | "
        "95.00 ± 0.00 | 96.00 ± 0.00 |"
    )
    assert differences.splitlines()[2] == (
        "| 75 | +0.00 ± 2.00 | -3.00 ± 2.00 | -1.00 ± 2.00 | -2.00 ± 2.00 | 0 / 1 / 1 |"
    )
    assert fates.splitlines()[2:] == [
        "| 75 | 2 | 4 | 20 % | 2.00 | 1 | 2 |",
        "| 150 | 1 | 2 | 10 % | 2.00 | 0 | 2 |",
    ]
    assert growth.mean_curves(FIGURES[1:]) == {"grown": [1.5], "host": [2.0], "static": [1.5]}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record.write, "__defaults__", (tmp_path,))
    return tmp_path


def test_growth_is_measured_in_parts_and_goes_on_where_the_same_commit_stopped(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def compare(task: str, config: RunConfig) -> dict[str, Any]:
        asked.append((config.max_epochs, config.seed))
        return row(config.max_epochs, config.seed, 96.0)

    monkeypatch.setattr(growth, "compare", compare)
    for seeds in (["2"], ["0", "2"], ["0", "1"]):
        monkeypatch.setattr("sys.argv", ["growth", "--seeds", *seeds, "--epochs", "5"])
        growth.main()
    assert asked == [(5, 2), (5, 0), (5, 1)]
    path = results / "growth-digits.json"
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert [row["seed"] for row in written["figures"]] == [0, 1, 2]
    written["figures"][0]["commit"] = "another"
    path.write_text(json.dumps(written), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["growth", "--seeds", "0", "3", "--epochs", "5", "--continued"])
    growth.main()
    assert asked[3:] == [(5, 3)]
    monkeypatch.setattr("sys.argv", ["growth", "--seeds", "0", "--epochs", "5"])
    growth.main()
    assert asked[4:] == [(5, 0)]


def test_growth_can_be_measured_with_other_settings(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunConfig] = []

    def compare(task: str, config: RunConfig) -> dict[str, Any]:
        asked.append(config)
        return row(config.max_epochs, config.seed, 96.0)

    monkeypatch.setattr(growth, "compare", compare)
    settings = tmp_path / "late.toml"
    settings.write_text('slots = ["late"]', encoding="utf-8")
    options = ["--seeds", "1", "--epochs", "5", "--settings", str(settings)]
    monkeypatch.setattr("sys.argv", ["growth", *options])
    growth.main()
    assert [config.slots for config in asked] == [("late",)]
    assert (results / "growth-digits-late.json").exists()


def growing(epochs: int) -> RunConfig:
    """A seed passes every gate as soon as it can."""
    growth = GrowthConfig(
        window=1,
        training_min_epochs=1,
        blending_potential=-100.0,
        blending_loss_change=100.0,
        blending_epochs=1,
        probation_min_epochs=1,
        fossilize_contribution=-100.0,
        fossilize_errors=100.0,
        harm=100.0,
    )
    policy = HeuristicConfig(min_epochs=0, plateau_epochs=0, life_margin=0)
    config = growth_runs.config_of("breast-cancer")
    return replace(config, max_epochs=epochs, growth=growth, policy=policy, keep="last", seed=1)


def test_three_networks_are_compared_at_equal_cost() -> None:
    """One seed is kept, whose slot is known; all parts of the cost are worked out by hand."""
    config = replace(growing(8), slots=("mid",))
    found = growth_runs.compare("breast-cancer", config)
    assert found["fossils"] == 1
    # layers of 30 x 4, 4 x 4, 4 x 4 and 4 x 2; the gradient of the first one's input is not needed
    host = 2 * 120 + 3 * (16 + 16 + 8)
    assert found["step"] == 64 * host
    seed = 3 * (4 + 4)  # a bottleneck of one unit
    assert found["unit"] == pytest.approx(1 + seed / host)
    learning = seed + 2 * (16 + 8)  # what lies behind it passes gradients on without own ones
    assert found["cost"] == pytest.approx(8 + (learning + 6 * seed) / host)
    assert found["parameters"] == found["host_parameters"] + 8 + 4 + 1 + 4 + 4
    assert found["harm"] == 0
    assert {len(curve) for curve in found["curves"].values()} == {growth_runs.POINTS}


def test_without_a_seed_all_three_are_the_same_network() -> None:
    found = growth_runs.compare("breast-cancer", replace(growing(3), slots=("mid",)))
    assert found["fossils"] == 0
    assert found["grown"] == found["host"] == found["static"]
    assert found["host_equal"] == found["static_equal"]


def test_a_static_network_starts_as_the_host_and_learns_at_the_rates_of_the_grown_one() -> None:
    config = growing(1)
    seeds = {"early": "gated", "late": "norm"}
    task = growth_runs.task_named("breast-cancer", config)
    same = growth_runs.static_task(task, config, seeds)
    host, static = (prepare(config, "fit", task=each) for each in (task, same))
    inputs = host.example
    assert torch.equal(host.model.eval()(inputs), static.model.eval()(inputs))
    (optimizer,) = static.optimizers.present()
    rates = {
        group["lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups
    }
    size = sum(p.numel() for p in host.model.parameters())
    gated = 8 + (8 * 4 + 8) + (4 * 4 + 4)
    assert rates == {config.optim.host_lr: size, config.optim.seed_lr: gated + 9}


def test_a_promise_is_the_squared_gradient_of_a_new_seed() -> None:
    """The seed is a norm at alpha 1, whose only gradient is that of its gain, here by finite
    differences."""
    config = growing(1)
    task = growth_runs.task_named("breast-cancer", config)
    model = prepare(config, "heuristic", task=task).model.double().eval()
    inputs, targets = load_splits(task).train
    inputs = inputs.double()
    policy = growth_variants.promising(config, task)(model)
    assert isinstance(policy, growth_variants.Promising)
    policy.inputs, policy.targets = inputs, targets
    torch.set_default_dtype(torch.float64)
    try:
        found = policy.promises(["early", "late"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(found) == {
        (s, b) for s in ("early", "late") for b in ("bottleneck", "gated", "norm")
    }
    _, entered = model.forward_keeping(inputs)
    x = entered["late"]
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()

    def loss(gain: float) -> float:
        logits = model.host.head(x + gain * (normed - x))
        return torch.nn.functional.cross_entropy(logits, targets).item()

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert found["late", "norm"] == pytest.approx(slope**2, rel=1e-4)


def test_the_seed_that_promises_most_for_its_cost_germinates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promises = {("early", "norm"): 1.0, ("early", "gated"): 9.0, ("late", "norm"): 4.0}
    costs = {("early", "norm"): 1.0, ("early", "gated"): 9.0, ("late", "norm"): 2.0}
    heuristic: Any = SimpleNamespace(decide=lambda signals: signals)
    unused: Any = None
    policy = growth_variants.Promising(
        heuristic, unused, unused, unused, lambda slot, blueprint: costs[slot, blueprint]
    )
    monkeypatch.setattr(policy, "promises", lambda free: promises)
    asked: Any = SimpleNamespace(op=Op.WAIT)
    assert policy.decide(asked) is asked

    @dataclass
    class Asked:
        op: Op = Op.GERMINATE
        slots: tuple[Any, ...] = ()
        slot: str = "mid"
        blueprint: str = "bottleneck"

    germinated: Any = Asked()
    decision = policy.decide(germinated)
    assert (decision.slot, decision.blueprint) == ("late", "norm")


def test_the_table_of_variants_compares_with_the_default_on_the_same_seeds(
    results: Path,
) -> None:
    record.write("growth-digits", FIGURES, results)
    rows = [row(75, seed, 95.0) | {"variant": "shrunk host"} for seed in (1, 0)]
    start = "| shrunk host | 75 | 2 | 95.00 | +1.00 ± 2.00 | -1.00 ± 0.00 "
    (without,) = growth_variants.table("digits", rows).splitlines()[2:]
    assert without == f"{start}| not measured | 1,500 | 112 | 112 |"
    rows[0]["static_shrunk"] = 94.5
    (with_one,) = growth_variants.table("digits", rows).splitlines()[2:]
    assert with_one == f"{start}| +0.50 | 1,500 | 112 | 112 |"


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
