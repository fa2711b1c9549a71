"""Does a learned controller pay? PPO on digits against the heuristic, random and no growth.

    python -m benchmarks ppo                    # goes on with the training in --out, if any
    python -m benchmarks ppo --reward sparse    # pays by another reward

Trains a policy, then lets each controller grow a network with each of 20 seeds that training and
evaluations never had. Differences are paired by seed, with the 95 % interval of 10,000 bootstrap
samples. Writes `results/ppo-digits-REWARD.json`, with the learning curve.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import record
from esper_train import EpisodeResult, Idle, RunConfig, run_heuristic_episode
from esper_train.config import preset
from esper_train.control.policy import Policy
from esper_train.control.rewards import RewardMode
from esper_train.morph.model import MorphModel
from esper_train.rl import train_ppo
from esper_train.rl.actions import ActionTable
from esper_train.rl.config import RLConfig
from esper_train.rl.learned import SavedPolicy
from esper_train.rl.policies import RandomLegal
from esper_train.run.run import PolicyMaker

NAME = "ppo-digits-{reward}"
"""The name of the results, and of the directory of the training."""
HELD_OUT = range(20)
"""Seeds of the comparison. Training has those from 10,000 on."""
SAMPLES = 10_000
LEARNED = "learned"
COLOURS = {LEARNED: "#2f6690", "heuristic": "#c8553d", "random": "#9aa5b1", "never": "#588157"}
"""The colours of the controllers in the picture."""
MEASURES = {
    "return": ("return", "+.2f"),
    "accuracy": ("accuracy, points", "+.2f"),
    "cost": ("training cost, epochs", "+.2f"),
}
"""Measures that are compared, with the heads and the format of their columns."""


def config_of_training(steps: int, reward: RewardMode = RewardMode.SHAPED) -> RunConfig:
    """Short runs on digits."""
    rl = RLConfig(
        hosts=8, steps=steps, rollout=40, batch=160, passes=8, evaluate_every=10, evaluations=4
    )
    config = replace(preset("digits"), max_epochs=40, batch_size=128, seed=10_000)
    return replace(config, reward=reward, rl=rl)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The results of one network: accuracy on the test split in percent, cost in epochs of the
    host."""

    controller: str
    seed: int
    reward: float
    accuracy: float
    parameters: int
    cost: float
    fossils: int
    decisions: dict[str, int]

    @classmethod
    def of(cls, controller: str, seed: int, result: EpisodeResult) -> Episode:
        return cls(
            controller=controller,
            seed=seed,
            reward=math.fsum(result.rewards),
            accuracy=result.test.points,
            parameters=result.parameters,
            cost=result.cost,
            fossils=result.fossils,
            decisions=result.action_counts,
        )

    def measure(self, name: str) -> float:
        return float(getattr(self, "reward" if name == "return" else name))


def controllers(config: RunConfig, learned: SavedPolicy) -> dict[str, PolicyMaker | None]:
    """A function that makes the controller of a run; None is the heuristic."""

    def random_legal(model: MorphModel) -> Policy:
        slots = [slot.state.slot for slot in model.slots]
        table = ActionTable(slots, model.registry.names(model.host.topology), config.rl.blends)
        return RandomLegal(table, config.growth, seed=config.seed)

    return {
        LEARNED: learned.maker(config),
        "heuristic": None,
        "random": random_legal,
        "never": lambda model: Idle(),
    }


def interval(
    differences: Sequence[float], samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(differences, k=len(differences))) for _ in range(samples))
    return means[int(0.025 * samples)], means[int(0.975 * samples)]


def compared(figures: dict[str, Any]) -> dict[str, list[Episode]]:
    """The episodes of each controller, by seed."""
    episodes = [Episode(**row) for row in figures["episodes"]]
    names = dict.fromkeys(episode.controller for episode in episodes)
    return {
        name: sorted((e for e in episodes if e.controller == name), key=lambda e: e.seed)
        for name in names
    }


def table(figures: dict[str, Any]) -> str:
    """Markdown: means of each controller, and what the learned one has more, with its interval."""
    found = compared(figures)
    head = ["controller", "return", "accuracy, %", "parameters", "training cost", "kept"]
    lines = [head]
    for name, episodes in found.items():
        lines.append(
            [
                name,
                f"{fmean(e.reward for e in episodes):.2f}",
                f"{fmean(e.accuracy for e in episodes):.2f}",
                f"{fmean(e.parameters for e in episodes):,.0f}",
                f"{fmean(e.cost for e in episodes):.1f}",
                f"{fmean(e.fossils for e in episodes):.2f}",
            ]
        )
    heads = [head for head, _ in MEASURES.values()]
    gains = [["the learned one less", *heads]]
    for name, episodes in found.items():
        if name != LEARNED:
            gains.append([name, *_gains(found[LEARNED], episodes)])
    return f"{record.markdown(lines)}\n\n{record.markdown(gains)}"


def _gains(learned: list[Episode], others: list[Episode]) -> list[str]:
    cells = []
    for name, (_, form) in MEASURES.items():
        differences = [
            mine.measure(name) - other.measure(name)
            for mine, other in zip(learned, others, strict=True)
        ]
        low, high = interval(differences)
        cells.append(f"{fmean(differences):{form}} ({low:{form}} to {high:{form}})")
    return cells


def curve(figures: dict[str, Any]) -> str:
    """Markdown: the learning curve, at every fourth update and at the evaluations."""
    lines = [["steps", "return in training", "return", "accuracy, %", "training cost"]]
    for line in figures["progress"]:
        found = line["evaluation"]
        if found is not None:
            measured = [
                f"{found['return']:.2f}",
                f"{found['accuracy']:.2f}",
                f"{found['cost']:.1f}",
            ]
        elif line["update"] % 4 == 0 and line["return"] is not None:
            measured = [""] * 3
        else:
            continue
        lines.append([f"{line['steps']:,}", f"{line['return']:.2f}", *measured])
    return record.markdown(lines)


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Draw return and accuracy of the training episodes over its steps, next to what every
    controller reaches on the held-out seeds."""
    found = compared(figures)
    progress = [line for line in figures["progress"] if line["return"] is not None]
    steps = [line["steps"] for line in progress]
    panels = {"return": "return of an episode", "accuracy": "accuracy on the test split, %"}
    with record.picture(path, 7.5, 3.4, columns=len(panels)) as columns:
        for axes, (name, label) in zip(columns, panels.items(), strict=True):
            values = [line[name] for line in progress]
            axes.plot(steps, values, color=COLOURS[LEARNED], label="learned, in training")
            for controller, episodes in found.items():
                mean = fmean(episode.measure(name) for episode in episodes)
                colour = COLOURS[controller]
                if controller == LEARNED:
                    axes.plot(steps[-1], mean, "o", color=colour, label="learned, held-out seeds")
                else:
                    axes.axhline(mean, color=colour, linestyle="--", label=controller)
            axes.set_xlabel("steps of training (epochs of a host)")
            axes.set_ylabel(label)
        columns[0].legend(frameon=False, fontsize=8)


def measure(
    config: RunConfig, learned: SavedPolicy, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Grow a network with each seed under each controller."""
    episodes = []
    for seed in HELD_OUT:
        own = replace(config, seed=seed)
        for name, policy in controllers(own, learned).items():
            episode = Episode.of(name, seed, run_heuristic_episode(own, policy=policy))
            episodes.append(asdict(episode))
            say(f"seed {seed}, {name}: {episode.reward:.2f}, {episode.accuracy:.2f}%")
    return episodes


def main() -> None:
    """Train, compare, write the figures."""
    parser = record.parser("ppo", __doc__)
    parser.add_argument("--reward", type=RewardMode, default=RewardMode.SHAPED)
    parser.add_argument("--steps", type=int, default=7_680)
    parser.add_argument("--out", type=Path, help="default: runs/ppo-digits-REWARD")
    options = parser.parse_args()
    config = config_of_training(options.steps, options.reward)
    name = NAME.format(reward=config.reward)
    out = options.out or Path("runs") / name
    learned = train_ppo(config, out, resume=out.exists(), say=print)
    text = (out / "progress.jsonl").read_text(encoding="utf-8")
    figures = {
        "progress": [json.loads(line) for line in text.splitlines()],
        "episodes": measure(config, learned),
    }
    path = record.write(name, figures)
    print(f"\n{table(figures)}\n\n{curve(figures)}\n\n{path}")


if __name__ == "__main__":
    main()
