"""Other ways to grow, each against the default and a static network of its own final size.

    python -m benchmarks growth_variants    # digits, 150 epochs

Writes `results/growth-variants.json`, and reads the default's figures from `growth-digits.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import record
from benchmarks.growth import Figures, gains, with_error
from benchmarks.growth_runs import config_of, run, seeds_of, static_task, task_named
from esper_train import Decision, HeuristicTamiyo, Op, RunConfig, SeedStage, Signals, Task
from esper_train.config import from_dict
from esper_train.morph.model import MorphModel
from esper_train.run.cost import multiply_adds
from esper_train.run.run import PolicyMaker, prepare
from esper_train.tasks import load_splits

TASK = "digits"
NAME = "growth-variants"
ROWS = 256
"""Training rows on which gradients are measured."""
TRIAL_COST = 0.3
"""Added to what a seed costs, in epochs of the host, so that one without multiply-adds has a
price."""
PROMISING = "largest gradient"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    PROMISING: {},
    "several seeds at once": {"policy": {"max_live_seeds": 3}},
    "lenient verdicts": {"growth": {"fossilize_contribution": 0.0, "fossilize_errors": 2.0}},
    "last slot only": {"slots": ["late"]},
}
"""What differs from the defaults."""


@dataclass
class Promising:
    """The heuristic, with another choice of slot and blueprint: the largest squared gradient norm
    of a new seed at alpha 1, per multiply-add that it would add to training.

    That is the fall of the loss that the first step promises, as in GradMax (Evci et al., 2022) and
    Firefly (Wu et al., 2020), which choose neurons by it.
    """

    heuristic: HeuristicTamiyo
    model: MorphModel
    inputs: Tensor
    targets: Tensor
    cost: Callable[[str, str], float]
    """Of a slot and a blueprint."""

    def reset(self) -> None:
        self.heuristic.reset()

    def decide(self, signals: Signals) -> Decision:
        decision = self.heuristic.decide(signals)
        if decision.op is not Op.GERMINATE:
            return decision
        free = [state.slot for state in signals.slots if state.stage is SeedStage.DORMANT]
        promises = self.promises(free)
        slot, blueprint = max(promises, key=lambda key: promises[key] / self.cost(*key))
        return replace(decision, slot=slot, blueprint=blueprint)

    def promises(self, slots: Iterable[str]) -> dict[tuple[str, str], float]:
        """The squared gradient norm by slot and blueprint. Changes nothing."""
        model = self.model
        names = model.registry.names(model.host.topology)
        was_training = model.training
        model.eval()
        found = {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, entered = model.forward_keeping(self.inputs)
            for slot in slots:
                for name in names:
                    blueprint = model.registry.require(model.host.topology, name)
                    seed = blueprint.build(model.host.slot_channels[slot])
                    logits = model(seed(entered[slot].detach()), start=slot)
                    parameters = list(seed.parameters())
                    gradients = torch.autograd.grad(cross_entropy(logits, self.targets), parameters)
                    found[slot, name] = sum(float(g.pow(2).sum()) for g in gradients)
        model.train(was_training)
        return found

    def state_dict(self) -> dict[str, Any]:
        return self.heuristic.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self.heuristic.load_state_dict(state_dict)


def unit(config: RunConfig, task: Task, seeds: Mapping[str, str]) -> float:
    """What an epoch of the host with these seeds costs, in epochs of the host."""
    with torch.random.fork_rng():
        with_seeds, host = (
            prepare(config, "fit", task=each) for each in (static_task(task, config, seeds), task)
        )
    return multiply_adds(with_seeds.model, host.example) / multiply_adds(host.model, host.example)


def promising(config: RunConfig, task: Task) -> PolicyMaker:
    """Makes `Promising` for the network of a run."""

    def make(model: MorphModel) -> Promising:
        inputs, targets = load_splits(task).train  # type: ignore[misc]
        costs: dict[tuple[str, str], float] = {}

        def cost(slot: str, blueprint: str) -> float:
            if (slot, blueprint) not in costs:
                added = unit(config, task, {slot: blueprint}) - 1
                costs[slot, blueprint] = TRIAL_COST + added
            return costs[slot, blueprint]

        names = model.registry.names(model.host.topology)
        heuristic = HeuristicTamiyo(config.policy, config.growth, names)
        return Promising(heuristic, model, inputs[:ROWS], targets[:ROWS], cost)

    return make


def measure(variant: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train a grown network, and the static network of its final size at the same cost."""
    base = replace(config_of(TASK), seed=seed, max_epochs=epochs)
    config = from_dict(RunConfig, SETTINGS[variant], base=base)
    task = task_named(TASK, config)
    policy = promising(config, task) if variant == PROMISING else None
    grown = run(config, task, "heuristic", policy)
    seeds = seeds_of(grown.result)
    same = static_task(task, config, seeds)
    cost = grown.result.cost
    equal = replace(config, max_epochs=round(cost / unit(config, task, seeds)))
    return {
        "variant": variant,
        "epochs": epochs,
        "seed": seed,
        "grown": grown.result.test.points,
        "static_equal": run(equal, same, "fit").result.test.points,
        "cost": cost,
        "parameters": grown.result.parameters,
        "seeds": seeds,
        "undone_epochs": grown.result.undone_epochs,
    }


def table(figures: Figures) -> str:
    """Markdown: each variant against the default on the same seeds, and against its own static
    network."""
    default = {(r["epochs"], r["seed"]): r for r in record.read(f"growth-{TASK}")["figures"]}
    head = ["variant", "seeds", "grown, %", "grown - default", "grown - static, same cost"]
    lines = [[*head, "parameters", "cost", "of the default"]]
    for variant in dict.fromkeys(row["variant"] for row in figures):
        rows = [row for row in figures if row["variant"] == variant]
        others = [default[row["epochs"], row["seed"]] for row in rows]
        more = [row["grown"] - other["grown"] for row, other in zip(rows, others, strict=True)]
        lines.append(
            [
                variant,
                str(len(rows)),
                f"{fmean(row['grown'] for row in rows):.2f}",
                with_error(more, "+"),
                with_error(gains(rows, "static_equal"), "+"),
                f"{fmean(row['parameters'] for row in rows):,.0f}",
                f"{fmean(row['cost'] for row in rows):.0f}",
                f"{fmean(other['cost'] for other in others):.0f}",
            ]
        )
    return record.markdown(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = record.parser("growth_variants", __doc__)
    parser.add_argument("--variants", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for variant in options.variants:
        for seed in options.seeds:
            figures.append(measure(variant, seed, options.epochs))
            record.write(NAME, figures)
            print(figures[-1], flush=True)
    print(f"\n{table(figures)}\n\n{record.RESULTS / NAME}.json")


if __name__ == "__main__":
    main()
