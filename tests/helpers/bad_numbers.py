"""Runs whose numbers go bad where a test says, and what is left of them."""

from dataclasses import replace
from typing import Any

from esper_train import GovernorConfig, RunConfig, TrainConfig
from tests.helpers.scripted import EASY

QUICK = GovernorConfig(min_history=2, patience=1, snapshot_epochs=2)

# With these run seeds, the seeds that grow contribute.
SHORT = RunConfig(
    task="synthetic",
    max_epochs=6,
    max_batches=4,
    seed=2,
    batch_size=32,
    growth=EASY,
    governor=QUICK,
    keep="last",
)


def config(policy: str, **changes: Any) -> RunConfig:
    return replace(SHORT, train=TrainConfig(on_bad_numbers=policy), **changes)  # type: ignore[arg-type]
