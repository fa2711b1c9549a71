"""For tests of runs that are stopped and resumed: a short run in which seeds go through every stage of their lives."""

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
blending_improvement = -100.0
blending_gradient_ratio = 0.0
fossilize_contribution = -100.0
blending_epochs = 3
training_dwell_fraction = 0.0
embargo_epochs = 1
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
    return cli.main(["heuristic", "--config", file, "--no-baseline", "--out", str(directory), *options])


def resume(directory: Path, *options: str) -> int:
    return cli.main(["heuristic", "--resume", str(directory), "--no-baseline", *options])


def reported(directory: Path) -> list[str]:
    """The lines of `metrics.jsonl` without the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [re.sub(r'"seconds": [0-9.e+-]+', '"seconds": 0', line) for line in lines]
