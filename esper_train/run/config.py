"""Settings of the checkpoints of a run."""

from dataclasses import dataclass

from esper_train.base.settings import Count, Settings


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, table="checkpoint."):
    """Settings that decide how often a run saves its state for resuming, and how many of these
    checkpoints it keeps."""

    every: Count = 10
    """Epochs between checkpoints. The last epoch and a run that is stopped always write one."""
    keep: Count = 2
    """Number of checkpoints that are kept, the newest ones."""
