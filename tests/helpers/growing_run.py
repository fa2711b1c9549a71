"""Helpers for tests that stop and resume runs: a short run in which seeds go through every
stage."""

import re
from pathlib import Path

from esper_train import cli

# both seeds at a time, gated blends; some seeds are fossilized and some are culled
TOML = """
task = "synthetic"
seed = 1
max_epochs = 20
max_batches = 3
[growth]
window = 1
training_min_epochs = 3
blending_potential = -100.0
blending_loss_change = 1e9
blending_epochs = 3
blending_cost = 100.0
fossilize_contribution = 0.0
probation_timeout = 2
fossilize_errors = 1e9
harm = 100.0
embargo_epochs = 1
undo_wait = 1
[policy]
min_epochs = 1
plateau_epochs = 1
plateau_threshold = 101.0
life_margin = 0
max_live_seeds = 2
blend = "gated"
"""


def config_file(directory: Path) -> str:
    path = directory / "growing.toml"
    path.write_text(TOML)
    return str(path)


def start(directory: Path, *options: str) -> int:
    """Run the whole thing in this process; the exit code."""
    directory.parent.mkdir(exist_ok=True)
    file = config_file(directory.parent)
    return cli.main(
        ["heuristic", "--config", file, "--no-baseline", "--out", str(directory), *options]
    )


def resume(directory: Path, *options: str) -> int:
    return cli.main(["heuristic", "--resume", str(directory), "--no-baseline", *options])


def reported(directory: Path) -> list[str]:
    """The lines of `metrics.jsonl` without the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [re.sub(r'"seconds": [0-9.e+-]+', '"seconds": 0', line) for line in lines]
