"""Explicit configuration: frozen dataclasses owned by the run, read from TOML, never from the environment.

`cli` builds one `RunConfig` and hands it to `episode`; the loop sees only its `TrainConfig`. Every field
has code that obeys it; unknown keys are refused with the nearest known name.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from esper_kernels import KernelConfig
from esper_train.names import require_known

T = TypeVar("T")
TELEMETRY_LEVELS = ("off", "minimal", "normal", "debug")


class Limit(NamedTuple):
    """What a setting must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("at least 1", lambda value: value >= 1)]
CountOrNone = Annotated[int | None, Limit("at least 1 or left out", lambda value: value is None or value >= 1)]
CountOrZero = Annotated[int, Limit("at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Limit("positive and finite", lambda value: 0 < value < math.inf)]
PositiveOrNone = Annotated[float | None, Limit("positive or left out", lambda value: value is None or value > 0)]
Share = Annotated[float, Limit("in [0, 1]", lambda value: 0 <= value <= 1)]
Decay = Annotated[float, Limit("in [0, 1)", lambda value: 0 <= value < 1)]


class Settings:
    """When made, refuses a value that is not among its field's choices or outside the `Limit` of its type.

    `table` is where the fields are in a TOML file.
    """

    _table: ClassVar[str]

    def __init_subclass__(cls, table: str = "") -> None:
        cls._table = table

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value, choices = getattr(self, name), typing.get_args(hint)
            if typing.get_origin(hint) is Literal:
                _require(
                    value in choices,
                    f"{self._table}{name} must be one of {', '.join(c or 'left out' for c in choices)}",
                    value,
                )
            elif typing.get_origin(hint) is Annotated:
                limit = hint.__metadata__[0]
                _require(limit.holds(value), f"{self._table}{name} must be {limit.words}", value)


def _require(holds: bool, what: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{what}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Settings, table="train.compile."):
    """How a run uses `torch.compile` on the model. Arguments other than the first and last are torch's own."""

    enabled: bool = False
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool | None = None
    """None: the batch size alone is dynamic, so that a ragged last batch is no new program."""
    backend: str = "inductor"
    error_on_graph_break: bool = False
    """For diagnosis: raise where the compiler would leave the graph and come back, and say where."""
    on_failure: Literal["raise", "eager"] = "raise"
    """When the first compiled call fails: raise, or go on uncompiled with the reason in the result."""


@dataclass(frozen=True, kw_only=True)
class AmpConfig(Settings, table="train.amp."):
    """Mixed precision: the forward under autocast. float16 adds a loss scaler, as `torch.amp.GradScaler` scales."""

    dtype: Literal["bfloat16", "float16", None] = None
    """"bfloat16" or "float16"; None computes in the model's own."""
    init_scale: Positive = 65536.0
    """Of the loss, in float16. It halves after a step with NaN or Inf gradients, which is skipped."""
    growth_interval: Count = 2000
    """Steps without any after which the scale doubles."""


@dataclass(frozen=True, kw_only=True)
class GradConfig(Settings, table="train.grad."):
    """Gradient statistics and clipping."""

    every: CountOrZero = 1
    """Measure the gradients of every n-th step of an epoch, the first included; 0 never measures."""
    clip_norm: PositiveOrNone = None
    """Clip the total gradient norm to this value before each step; None never clips."""
    vanishing: float = 1e-7
    """A gradient tensor with a smaller L2 norm counts as vanishing."""
    exploding: float = 100.0
    """A gradient tensor with a larger or non-finite L2 norm counts as exploding."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, table="train."):
    """What the epoch loop obeys, the same for every way of training."""

    kernel: KernelConfig = field(default_factory=KernelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    grad: GradConfig = field(default_factory=GradConfig)
    accumulate: Count = 1
    """Batches a step. Their gradient is that of the mean over all their valid rows; with a criterion other than
    cross entropy, that of the mean over the batches."""
    capture: bool = False
    """Replay each step, from forward to optimizer, as one CUDA graph: captured after three steps, and anew when seeds,
    optimizers or settings change. The forward must do the same for every batch, since its Python code runs only at
    the capture; batches of another shape than the first run eagerly. Learning rates are float32 then."""
    topk: tuple[int, ...] = (1,)
    """Ranks k for which correct@k is counted; 1 is always among them."""
    on_bad_numbers: Literal["warn", "skip", "stop", "rollback"] = "stop"
    """NaN, infinity, divergence, bad targets: go on and report; report, and leave out steps with gradients that are
    not finite; end the run; or return to the last good state. Only "stop" refuses targets outside the classes, the
    others leave their rows out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        measured = self.on_bad_numbers != "skip" or self.grad.every == 1
        _require(measured, "train.on_bad_numbers 'skip' needs train.grad.every = 1", self.grad.every)
        if self.capture:
            alone = not self.compile.enabled
            _require(alone, "train.capture does not go with train.compile.enabled; leave one of them out", True)
            measured = self.grad.clip_norm is None or self.grad.every == 1
            _require(measured, "train.capture with train.grad.clip_norm needs train.grad.every = 1", self.grad.every)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings, table="optim.schedule."):
    """How learning rates change over what is left of the run when their optimizer is made."""

    kind: Literal["constant", "cosine", "onecycle"] = "constant"
    """Constant, or torch's CosineAnnealingLR or OneCycleLR."""
    each: Literal["step", "epoch"] = "step"
    """When the rate changes."""
    final: Share = 0.0
    """cosine: the share of the rate that is left at the end."""
    warmup: Share = 0.3
    """onecycle: the share of the time in which the rate rises to its own value, before it falls."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings, table="optim."):
    """One optimizer for the host and, with its own learning rate and state, one for each seed."""

    kind: Literal["sgd", "adamw"] = "sgd"
    host_lr: Positive = 0.01
    seed_lr: Positive = 0.03
    momentum: Decay = 0.9
    """Of SGD; AdamW keeps torch's own betas."""
    weight_decay: float = 5e-4
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class HostConfig(Settings, table="host."):
    """Size of the host network that a task builds."""

    width: CountOrNone = None
    """CNN: channels of the first block, each further one doubles them. Sequence models: size of an embedding.
    None takes the task's default."""
    depth: CountOrNone = None
    """Number of blocks; None takes the task's default."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig(Settings, table="growth."):
    """Thresholds of the quality gates and lengths of the stages. Accuracy in percentage points, time in epochs."""

    blending_improvement: float = 0.5
    """G2: validation accuracy gained since the seed began to train."""
    blending_min_epochs: CountOrZero = 3
    """G2: epochs in TRAINING, at least; see also `training_dwell_fraction`."""
    blending_gradient_ratio: float = 0.05
    """G2: size-corrected gradient norm of the seed over that of the host."""
    probation_min_epochs: CountOrZero = 3
    """G3: epochs in BLENDING."""
    probation_alpha: Share = 0.95
    """G3: share of the seed in the slot's output."""
    fossilize_contribution: float = 1.0
    """G5: validation accuracy with the seed minus accuracy without it."""
    training_dwell_fraction: Share = 0.1
    """Share of the run a seed stays in TRAINING at least."""
    training_timeout: Count = 15
    """A seed that has not reached BLENDING after this many epochs, or twice the dwell, is culled."""
    blending_epochs: Count = 5
    """Epochs over which alpha rises from 0 to 1."""
    probation_timeout_fraction: Share = 0.1
    """Share of the run (5 epochs at least) after which a seed on probation is culled."""
    embargo_epochs: CountOrZero = 5
    """Epochs for which the slot of a culled seed stays closed."""
    max_seeds: int | None = None
    """Seeds seated at most at a time, fossilized ones included; None allows one in each slot."""
    fossil_check_epochs: Count = 5
    """A fossilized seed's contribution is measured again every so many epochs."""
    isolate_training: bool = True
    """In TRAINING the seed learns without sending gradients into the host."""
    on_fossilize: Literal["keep", "freeze"] = "keep"
    """A fossilized seed keeps training with its own optimizer, or is frozen."""

    def training_dwell(self, max_epochs: int) -> int:
        """Epochs a seed spends in TRAINING at least, in a run of `max_epochs`."""
        return max(1, int(max_epochs * self.training_dwell_fraction))

    def training_limit(self, max_epochs: int) -> int:
        """Epochs in TRAINING after which a seed is culled, in a run of `max_epochs`."""
        return max(self.training_timeout, 2 * self.training_dwell(max_epochs))

    def probation_timeout(self, max_epochs: int) -> int:
        """Epochs after which a seed on probation is culled, in a run of `max_epochs`."""
        return max(5, int(max_epochs * self.probation_timeout_fraction))

    def seed_life(self, max_epochs: int) -> int:
        """Fewest epochs from germination to a measured contribution at full alpha."""
        training = max(self.training_dwell(max_epochs), self.blending_min_epochs)
        return training + max(self.blending_epochs, self.probation_min_epochs) + 1


@dataclass(frozen=True, kw_only=True)
class HeuristicConfig(Settings, table="policy."):
    """Rules of the heuristic controller and of the signal tracker that feeds it."""

    plateau_threshold: float = 0.5
    """Percentage points by which validation accuracy must beat its last best to end a plateau."""
    plateau_epochs: int = 3
    """Length of a plateau after which a seed is germinated."""
    max_live_seeds: Count = 1
    """Seeds whose fate is open at most at a time."""
    min_epochs: int = 5
    """No germination before this epoch."""
    life_margin: int = 7
    """No germination when fewer epochs than a whole seed life plus this many are left."""
    cull_after_epochs: int = 5
    """A seed younger than this in BLENDING is not culled for lost accuracy; of use where blending lasts longer."""
    cull_accuracy_drop: float = 2.0
    """Percentage points lost since the stage began that get a seed with alpha above 0 culled."""
    blueprints: tuple[str, ...] = ()
    """Rotation of blueprints, first choice first; empty takes the registry's order for the host's topology."""
    blend: str = "sigmoid"
    cull_penalty: float = 2.0
    """Added to a blueprint's penalty when a seed made from it is culled."""
    penalty_decay: Decay = 0.9
    """Factor a penalty keeps each epoch; slow enough that a penalty outlives the slot's embargo."""
    penalty_limit: float = 1.0
    """A blueprint with at least this penalty is passed over while another is below it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.blueprints)) < len(self.blueprints):
            raise ValueError(f"policy.blueprints names one more than once: {', '.join(self.blueprints)}")


@dataclass(frozen=True, kw_only=True)
class GovernorConfig(Settings, table="governor."):
    """When a finite validation loss counts as gone bad, and what a rollback does. Time in epochs."""

    window: Count = 20
    """Good epochs that a loss is compared with, at most."""
    min_history: Count = 5
    """Good epochs needed for a comparison."""
    sensitivity: float = 6.0
    """Divergence: worse than guessing, above the mean of the window by so many standard deviations, ..."""
    multiplier: float = 3.0
    """... and above so many times that mean."""
    patience: Count = 3
    """Suspicious epochs in a row that make a finding; a loss that is not finite makes one at once."""
    snapshot_epochs: Count = 5
    """With rollback, keep a checked state every so many epochs."""
    snapshot_device: str = "cpu"
    """Where it is kept."""
    max_rollbacks: Count = 3
    """The finding after so many rollbacks ends the run."""
    rollback_penalty: float = 10.0
    """Taken from the reward of an epoch that is rolled back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.min_history <= self.window, "governor.min_history must not exceed window", self.min_history)


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(Settings, table="telemetry."):
    """What a run reports. Telemetry never changes what is trained."""

    level: Literal["off", "minimal", "normal", "debug"] = "normal"
    """minimal: the run, the seeds' lives, bad numbers. normal: each epoch too. debug: each parameter's gradient too."""
    lifecycle_only: bool = False
    """Nothing but the run's start and end and the seeds' lives."""
    escalation_epochs: CountOrZero = 5
    """After bad numbers or exploding gradients, report at debug level for so many epochs; 0 never does."""
    tensorboard: bool = False
    """Also write for TensorBoard, into the run directory's tensorboard/."""
    wandb: bool = False
    """Also write for Weights & Biases, offline, into the run directory's wandb/; `wandb sync` uploads it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, table="checkpoint."):
    """How often a run saves all it needs to be resumed, and how much of that it keeps."""

    every: Count = 10
    """Epochs from one checkpoint to the next; the last epoch and a run that is stopped write one in any case."""
    keep: Count = 2
    """The newest so many are kept."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run of `esper-train`, whole."""

    task: str = "digits"
    data: str | None = None
    """Directory of the task's data, where it needs one."""
    vocab: int = 256
    """Size of a language task's vocabulary: 256 is bytes, more is a trained byte-pair encoding."""
    device: str = "cpu"
    slots: tuple[str, ...] = ("early", "mid", "late")
    """Slots open for seeds, of those that the host's depth allows."""
    episodes: Count = 1
    """Runs in a row, with the seeds seed, seed + 1000, ..."""
    max_epochs: Count = 75
    max_batches: CountOrNone = None
    """Batches of an epoch at most; None takes all."""
    batch_size: Count = 64
    evaluation_batch: Count = 512
    """Rows a batch where nothing is trained. Many save calls; on a CPU, more than the caches hold take longer."""
    workers: CountOrZero = 0
    """Processes that prepare batches, of the same numbers for any count of them. 0 indexes the data in place, on the
    device where it fits, which is faster for tensors in memory."""
    channels_last: bool | None = None
    """Convolutions in channels-last layout; None: where it pays, that is with 16 channels or more on a CPU, and in
    half precision on a GPU."""
    seed: int = 42
    reward: Literal["shaped", "sparse", "minimal", "loss"] = "shaped"
    """How decisions are rewarded; see `control/rewards.py`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    host: HostConfig = field(default_factory=HostConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    policy: HeuristicConfig = field(default_factory=HeuristicConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def from_dict(cls: type[T], values: Mapping[str, Any], *, base: T | None = None, where: str = "") -> T:
    """Build a config dataclass from plain values, as TOML and JSON give them.

    Keys left out keep the value of `base`, or their default. Raises `ValueError` for an unknown key (naming the
    nearest known one) and `TypeError` for a value of the wrong type; messages put `where` before the key.
    """
    hints = typing.get_type_hints(cls)
    names = [where + f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        require_known("config key", where + key, names)
        arguments[key] = _convert(hints[key], value, where + key, getattr(base, key, None))
    return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)  # type: ignore[type-var]


def load_toml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """Read a `RunConfig` from a TOML file; keys left out keep the value of `base`, or their default."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return from_dict(RunConfig, values, base=base)


def _convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"config key {path!r} is a table of settings, got {value!r}")
        return from_dict(hint, value, base=base, where=path + ".")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"config key {path!r} takes a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, path) for item in value)
    if typing.get_origin(hint) is Literal:
        return value  # the dataclass itself names the choices
    accepted = typing.get_args(hint) or (hint,)
    if float in accepted and type(value) is int:
        return float(value)
    if type(value) not in accepted:
        expected = " or ".join(t.__name__ for t in accepted)
        raise TypeError(f"config key {path!r} takes {expected}, got {value!r}")
    return value
