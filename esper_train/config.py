"""The settings of a whole run: one object, put together from the settings of each room, read from
TOML.

`cli` builds one `RunConfig` and hands it to `run`; the loop sees only its `TrainConfig`. Every
field has code that obeys it; nothing is read from the environment.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from esper_train.base.settings import Count, CountOrNone, Limit, Settings, from_dict, require
from esper_train.control.config import GovernorConfig, HeuristicConfig
from esper_train.morph.config import GrowthConfig, HostConfig
from esper_train.rl.config import RLConfig
from esper_train.run.config import CheckpointConfig
from esper_train.tasks.config import PRESETS, TaskConfig
from esper_train.telemetry.config import TelemetryConfig
from esper_train.train.config import DistributedConfig, OptimConfig, TrainConfig

SEED_STEP = 1000
"""Distance between the seeds of successive episodes."""


# A typing error must not start so many processes that the machine stops responding.
Workers = Annotated[int, Limit("between 0 and 512", lambda value: 0 <= value <= 512)]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """All settings of one run of `esper-train`."""

    task: str = "digits"
    """Name of a task, or MODULE:NAME for one of your own."""
    data: str | None = None
    """Directory of the task's data, if it needs one."""
    vocab: Count = 256
    """Size of a language task's vocabulary: 256 is bytes, more is a trained byte-pair encoding."""
    device: str = "cpu"
    """Device that trains, as torch names it: "cpu", "cuda", "cuda:1"."""
    slots: tuple[str, ...] = ("early", "mid", "late")
    """Slots that may get seeds, among those that the host has."""
    episodes: Count = 1
    """Number of runs one after the other, with the random seeds seed, seed + 1000, ..."""
    max_epochs: Count = 75
    """Epochs of training."""
    max_batches: CountOrNone = None
    """The largest number of batches per epoch; None takes all."""
    batch_size: Count = 64
    """Rows per batch of training, of all processes together."""
    evaluation_batch: Count = 512
    """Rows per batch of validation and test. Large batches save calls, but on a CPU those that
    exceed the caches are slower."""
    workers: Workers = 0
    """Processes that prepare batches; the batches do not depend on it. 0 indexes the data in place,
    on the device if they fit there, which is faster for tensors in memory."""
    channels_last: bool | None = None
    """Run convolutions in channels-last layout. None chooses it where it is faster: on a CPU from
    16 channels on, on a GPU in half precision."""
    seed: int = 42
    """Seed of all random numbers, a 64-bit integer."""
    keep: Literal["best", "last"] = "best"
    """The network that a run gives: that of the epoch with the lowest validation loss, of the
    epochs without a seed on trial, or that of the last epoch."""
    reward: Literal["shaped", "sparse", "minimal", "loss"] = "shaped"
    """How decisions are rewarded; a `RewardMode` of `control/rewards.py`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    host: HostConfig = field(default_factory=HostConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    policy: HeuristicConfig = field(default_factory=HeuristicConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rl: RLConfig = field(default_factory=RLConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.seed + SEED_STEP * (self.episodes - 1)
        words = (
            f"seed must be at least -2**63, and the last of {self.episodes} episodes' seeds "
            "below 2**63 - 1"
        )
        require(self.seed >= -(2**63) and last < 2**63 - 1, words, self.seed)
        one_process = self.distributed.strategy == "none"
        words = "train.capture needs distributed.strategy 'none'"
        require(one_process or not self.train.capture, words, self.distributed.strategy)
        if self.distributed.strategy == "fsdp2":
            self._check_sharded()

    def _check_sharded(self) -> None:
        """Refuse what needs whole parameters."""
        train = self.train
        clips = train.grad.clip_norm is not None
        for allowed, words, found in (
            (not train.compile.enabled, "train.compile.enabled = False", True),
            (not train.linear_loss, "train.linear_loss = False", True),
            (train.amp.dtype != "float16", "another train.amp.dtype", train.amp.dtype),
            (not self.channels_last, "channels_last = False", True),
            (not clips or train.grad.every == 1, "train.grad.every = 1", train.grad.every),
        ):
            require(allowed, f"distributed.strategy 'fsdp2' needs {words}", found)

    def task_config(self) -> TaskConfig:
        """The settings that the task gets about its data."""
        return TaskConfig(data=self.data, vocab=self.vocab)


def preset(task: str) -> RunConfig:
    """The settings that a task's runs start from."""
    return from_dict(RunConfig, {"task": task, **PRESETS.get(task, {})})


def load_toml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """Read a `RunConfig` from the TOML file at `path`; keys left out keep the value of `base`, or
    their default. ValueError for what is not TOML or not a setting, naming it."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return from_dict(RunConfig, values, base=base)
