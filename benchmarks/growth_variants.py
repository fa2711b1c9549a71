"""Other ways to grow, each against the default and a static network of its own final size.

    python -m benchmarks growth_variants    # digits, 150 epochs
    python -m benchmarks growth_variants --variants "renewed host" --epochs 75
    python -m benchmarks growth_variants --task breast-cancer

Writes `results/growth-variants-TASK.json`, in which figures of other variants, seeds and lengths
stay, and reads the default's figures from `growth-TASK.json`.

Long file: the variants are read side by side, each a few lines that no package needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import record
from benchmarks.growth import Figures, gains, with_error
from benchmarks.growth_runs import NAMES, config_of, run, seeds_of, static_task, task_named
from esper_train import (
    Decision,
    EpisodeResult,
    HeuristicTamiyo,
    Op,
    RunConfig,
    SeedStage,
    Signals,
    Task,
)
from esper_train.config import from_dict
from esper_train.morph.blueprints import Blueprint, convolution
from esper_train.morph.lifecycle import SlotState
from esper_train.morph.model import MorphModel
from esper_train.run.cost import multiply_adds
from esper_train.run.episode import Episode
from esper_train.run.run import EpisodeRun, PolicyMaker, prepare
from esper_train.tasks import load_splits

ROWS = 256
"""Training rows on which gradients are measured."""
TRIAL_COST = 0.3
"""Added to what a seed costs, in epochs of the host, so that one without multiply-adds has a
price."""
RAISED_EPOCHS = 10
RAISED = 3.0
"""A merge raises learning rates to this multiple, from which they return in `RAISED_EPOCHS`."""
RENEWED = 0.3
"""How much of the way back to new weights those of the host go after a merge."""
SHRINK = 0.5
"""The factor by which the host's matrices shrink instead."""
EARLY: Mapping[str, Any] = {
    "policy": {"min_epochs": 3, "plateau_epochs": 0},
    "growth": {"window": 3, "training_min_epochs": 3, "blending_epochs": 3},
}
PROMISING = "largest gradient"
WIDER = "wider seeds"
WIDE = Blueprint("conv_wide", "cnn", partial(convolution, expand=16))
"""A branch four times as wide as the widest of the package."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    PROMISING: {},
    "several seeds at once": {"policy": {"max_live_seeds": 3}},
    "lenient verdicts": {"growth": {"fossilize_contribution": 0.0, "fossilize_errors": 2.0}},
    "last slot only": {"slots": ["late"]},
    "early": EARLY,
    "early, several at once": {**EARLY, "policy": {**EARLY["policy"], "max_live_seeds": 3}},
    "raised rates": {},
    "renewed host": {},
    "shrunk host": {"growth": {"shrink_host": SHRINK}},
    "pruned fossils": {},
    WIDER: {"policy": {"blueprints": [WIDE.name]}},
    "no seed after a failure": {"growth": {"undo_wait": 1000, "undo_wait_ceiling": 1000}},
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
    """The cost of an epoch of the host with these seeds, in epochs of the host alone."""
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


AfterEpoch = Callable[[Episode], None]


@dataclass
class RaisedRates:
    """After a merge, the learning rates of host and fossils are `RAISED` times their own, and
    return to them in a straight line."""

    fossils: int = 0
    left: int = 0

    def __call__(self, episode: Episode) -> None:
        self.left = max(0, self.left - 1)
        if episode.model.fossils > self.fossils:
            self.left = RAISED_EPOCHS
        self.fossils = episode.model.fossils
        kept = [s.state.slot for s in episode.model.slots if s.state.stage is SeedStage.FOSSILIZED]
        factor = 1 + (RAISED - 1) * self.left / RAISED_EPOCHS
        for optimizer in episode.optimizers.present(["host", *kept]):
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]


def prune_fossils(episode: Episode) -> None:
    """Remove the fossils without which validation accuracy was no lower, on average over the last
    `growth.window` measurements."""
    for slot in episode.model.slots:
        state = slot.state
        measured = len(state.contributions) == slot.growth.window
        gone = measured and fmean(state.contributions) <= 0
        if state.stage is SeedStage.FOSSILIZED and gone:
            slot.restore(SlotState(slot=state.slot), None)
            episode.optimizers.detach(state.slot)


@dataclass
class RenewedHost:
    """After a merge, the host's weights go a part of the way to those of a new one, as in shrink
    and perturb (Ash and Adams, 2020)."""

    task: Task
    fossils: int = 0

    def __call__(self, episode: Episode) -> None:
        merged = episode.model.fossils > self.fossils
        self.fossils = episode.model.fossils
        if not merged:
            return
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            new = self.task.build_host(episode.config.host)
            pairs = zip(episode.model.host.parameters(), new.parameters(), strict=True)
            for weight, fresh in pairs:
                weight.lerp_(fresh, RENEWED)


@dataclass
class MergeCosts:
    """The cost of the run until each merge, in epochs of the host."""

    fossils: int = 0
    costs: list[float] = field(default_factory=list)

    def __call__(self, episode: Episode) -> None:
        if episode.model.fossils > self.fossils:
            self.costs.append(episode.cost.epochs)
        self.fossils = episode.model.fossils


@dataclass
class ShrunkAfter:
    """The matrices of the whole network shrink after each of these epochs, without growing."""

    epochs: Sequence[int]
    epoch: int = 0

    def __call__(self, episode: Episode) -> None:
        self.epoch += 1
        episode.model.shrink_host(SHRINK ** self.epochs.count(self.epoch))


def after_epoch(variant: str, task: Task) -> AfterEpoch:
    """The function that changes the network after each epoch, as the variant demands."""
    match variant:
        case "raised rates":
            return RaisedRates()
        case "pruned fossils":
            return prune_fossils
        case "renewed host":
            return RenewedHost(task)
        case "shrunk host":
            return MergeCosts()
        case _:
            return lambda episode: None


def trained(
    config: RunConfig, task: Task, mode: str, policy: PolicyMaker | None, then: AfterEpoch
) -> EpisodeResult:
    """The result of a run; `mode` is "heuristic" or "fit", and `then` follows each epoch."""
    episode = prepare(config, mode, task=task, policy=policy)
    with EpisodeRun(episode) as run, episode.random.active():
        while not run.over:
            signals = run.observe(run.launch().read())
            if signals is not None:
                run.apply(episode.decide(signals))
            then(episode)
        return run.finish(run.launch_test().read())


def measure(
    name: str, variant: str, seed: int, epochs: int, *, with_static: bool
) -> dict[str, Any]:
    """Train a grown network on the named task, and the static network of its final size at the same
    cost. Where the grown one shrank, also train a static one that shrinks at the same costs."""
    base = replace(config_of(name), seed=seed, max_epochs=epochs)
    config = from_dict(RunConfig, SETTINGS[variant], base=base)
    task = task_named(name, config)
    if variant == WIDER:
        task = replace(task, blueprints=(WIDE,))
    policy = promising(config, task) if variant == PROMISING else None
    then = after_epoch(variant, task)
    grown = trained(config, task, "heuristic", policy, then)
    seeds = seeds_of(grown)
    static = static_shrunk = None
    if with_static:
        same = static_task(task, config, seeds)
        epoch = unit(config, task, seeds)
        equal = replace(config, max_epochs=round(grown.cost / epoch))
        static = run(equal, same, "fit").result.test.points
        if isinstance(then, MergeCosts):
            shrinks = ShrunkAfter([round(cost / epoch) for cost in then.costs])
            static_shrunk = trained(equal, same, "fit", None, shrinks).test.points
    return {
        "variant": variant,
        "epochs": epochs,
        "seed": seed,
        "grown": grown.test.points,
        "static_equal": static,
        "static_shrunk": static_shrunk,
        "cost": grown.cost,
        "parameters": grown.parameters,
        "seeds": seeds,
        "undone_epochs": grown.undone_epochs,
        "commit": record.environment()["commit"],
    }


def results_of(task: str) -> str:
    """The name of the results of a task's variants."""
    return f"growth-variants-{task}"


def table(task: str, figures: Figures) -> str:
    """Markdown: each variant against the default on the same seeds, and against its own static
    networks."""
    default = {(r["epochs"], r["seed"]): r for r in record.read(f"growth-{task}")["figures"]}
    head = ["variant", "epochs", "seeds", "grown, %", "grown - default"]
    rivals = {
        "grown - static, same cost": "static_equal",
        "grown - static that shrinks too": "static_shrunk",
    }
    lines = [[*head, *rivals, "parameters", "cost", "of the default"]]
    for variant, epochs in dict.fromkeys((row["variant"], row["epochs"]) for row in figures):
        rows = [row for row in figures if (row["variant"], row["epochs"]) == (variant, epochs)]
        others = [default[row["epochs"], row["seed"]] for row in rows]
        more = [row["grown"] - other["grown"] for row, other in zip(rows, others, strict=True)]
        lines.append(
            [
                variant,
                str(epochs),
                str(len(rows)),
                f"{fmean(row['grown'] for row in rows):.2f}",
                with_error(more, "+"),
                *(gain_over(rows, rival) for rival in rivals.values()),
                f"{fmean(row['parameters'] for row in rows):,.0f}",
                f"{fmean(row['cost'] for row in rows):.0f}",
                f"{fmean(other['cost'] for other in others):.0f}",
            ]
        )
    return record.markdown(lines)


def gain_over(rows: Figures, rival: str) -> str:
    """The gain over a rival in words, of the rows that have one."""
    measured = [row for row in rows if row.get(rival) is not None]
    return with_error(gains(measured, rival), "+") if measured else "not measured"


def earlier(task: str) -> Figures:
    """The figures of a task that were written before."""
    name = results_of(task)
    if not (record.RESULTS / f"{name}.json").exists():
        return []
    figures: Figures = record.read(name)["figures"]
    return figures


def with_row(figures: Figures, last: dict[str, Any]) -> Figures:
    """The figures with another row, which takes the place of an earlier one about the same run."""

    def run_of(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["variant"], row["epochs"], row["seed"]

    found = {run_of(row): row for row in (*figures, last)}
    order = list(SETTINGS)
    return [found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), *key[1:]))]


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = record.parser("growth_variants", __doc__)
    parser.add_argument("--task", default="digits", choices=NAMES)
    parser.add_argument("--variants", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--without-static", action="store_true", help="half the work, for a choice")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = options.task
    for variant in options.variants:
        for seed in options.seeds:
            with_static = not options.without_static
            last = measure(task, variant, seed, options.epochs, with_static=with_static)
            record.write(results_of(task), with_row(earlier(task), last))
            print(last, flush=True)
    print(f"\n{table(task, earlier(task))}\n\n{record.RESULTS / results_of(task)}.json")


if __name__ == "__main__":
    main()
