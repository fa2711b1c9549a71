"""Test accuracy that a seed would bring when it passes G2, for three slots and several seeds.

    python -m benchmarks gate    # digits, 3 slots x 6 seeds

Each run has one slot, and its seed is held in TRAINING for `growth.training_timeout` epochs. After
each of them the seed's potential is measured on the validation split, as G2 sees it, and its gain
on the test split: the accuracy with the seed at alpha 1, minus that without. The table then asks
the gate itself, at several thresholds, in which epoch each seed would have passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from benchmarks import record
from esper_train import GrowthConfig, RunConfig, SeedStage, SlotState, evaluate
from esper_train.config import preset
from esper_train.morph.gates import judge
from esper_train.run.episode import Episode
from esper_train.run.epoch import Epoch
from esper_train.run.run import prepare

SLOTS = ("early", "mid", "late")
THRESHOLDS = (-1.0, -0.5, 0.0, 0.1, 0.2, 0.3, 0.5)
"""Points of potential; with each, the loss must fall."""
MOST_EPOCHS = 300
"""In which every host comes to a plateau, so that a seed germinates."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A seed at the end of an epoch in TRAINING. Accuracies in percentage points, loss in nats."""

    potential: float
    potential_loss: float
    test_gain: float


@dataclass(frozen=True, kw_only=True)
class Course:
    """A seed in TRAINING, epoch by epoch."""

    slot: str
    seed: int
    blueprint: str
    epochs: tuple[Measured, ...]

    def gain_on_passing(self, growth: GrowthConfig) -> float | None:
        """Its test gain in the first epoch in which it would pass G2; None if in none."""
        for number, now in enumerate(self.epochs[: growth.training_timeout], 1):
            seen = self.epochs[max(0, number - growth.window) : number]
            state = SlotState(
                slot=self.slot,
                stage=SeedStage.TRAINING,
                epochs_in_stage=number,
                potentials=tuple((past.potential, past.potential_loss) for past in seen),
            )
            if judge(SeedStage.BLENDING, state, growth).passed:
                return now.test_gain
        return None


def measure(config: RunConfig, slot: str) -> Course:
    """Train until the first seed has been in TRAINING for as long as it may be."""
    growth = config.growth
    held = replace(growth, blending_potential=math.inf, training_timeout=MOST_EPOCHS)
    config = replace(config, slots=(slot,), max_epochs=MOST_EPOCHS, growth=held)
    episode = prepare(config, "heuristic")
    measured = []
    with episode.random.active():
        for now in epochs_in_training(episode, slot):
            measured.append(now)
            if len(measured) == growth.training_timeout:
                break
    blueprint = episode.model.slot(slot).state.blueprint
    assert blueprint is not None
    return Course(slot=slot, seed=config.seed, blueprint=blueprint, epochs=tuple(measured))


def epochs_in_training(episode: Episode, slot: str) -> Iterator[Measured]:
    """Run the episode, and measure every epoch that a seed spends in TRAINING."""
    model = episode.model
    for number in range(1, MOST_EPOCHS + 1):
        epoch = Epoch(episode, number)
        signals = epoch.observe(epoch.launch().read())
        if signals is None:
            raise RuntimeError(f"the losses went bad in epoch {number}")
        state = model.slot(slot).state
        if state.potential is not None and state.potential_loss is not None:
            test = evaluate(
                model,
                episode.test,
                episode.config.train,
                task_type=episode.task.task_type,
                variants={slot: {slot: 1.0}},
                scopes={slot: model.incubation(slot).entered},
                step=episode.step,
            )
            yield Measured(
                potential=state.potential,
                potential_loss=state.potential_loss,
                test_gain=test.variants[slot].points - test.points,
            )
        epoch.apply(episode.policy.decide(signals))
        episode.epoch = number


def course(row: dict[str, Any]) -> Course:
    """A course as it was written."""
    epochs = tuple(Measured(**measured) for measured in row["epochs"])
    return Course(**{**row, "epochs": epochs})


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: the gate's own thresholds, then others."""
    courses = [course(row) for row in figures]
    default = GrowthConfig()
    gates = [default]
    gates += [
        replace(default, blending_potential=points, blending_loss_change=0.0)
        for points in THRESHOLDS
    ]
    head = "potential at least, points", "loss change below, nats", "pass", "test gain, points"
    lines = [list(head)]
    for growth in gates:
        found = [gain for one in courses if (gain := one.gain_on_passing(growth)) is not None]
        error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        lines.append(
            [
                f"{growth.blending_potential:g}",
                f"{growth.blending_loss_change:g}",
                f"{len(found)} of {len(courses)}",
                f"{mean(found):+.2f} ± {error:.2f}" if found else "",
            ]
        )
    return record.markdown(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = record.parser("gate", __doc__)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    figures = []
    for slot in SLOTS:
        for seed in range(options.seeds):
            last = measure(replace(preset("digits"), seed=seed), slot)
            figures.append(asdict(last))
            record.write("gate", figures)
            print(f"{slot}, seed {seed}: {last.blueprint}", flush=True)
    print(f"\n{table(figures)}\n\n{record.RESULTS / 'gate.json'}")


if __name__ == "__main__":
    main()
