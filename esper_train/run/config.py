"""Settings of the checkpoints of a run."""

from dataclasses import dataclass

from esper_train.base.settings import Count, Settings


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, table="checkpoint."):
    """How often a run saves all it needs to be resumed, and how much of that it keeps."""

    every: Count = 10
    """Epochs from one checkpoint to the next; the last epoch and a run that is stopped write one in
    any case."""
    keep: Count = 2
    """The newest so many are kept."""
