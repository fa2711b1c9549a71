"""Settings of the epoch loop and of the optimizers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from esper_kernels import KernelConfig
from esper_train.base.settings import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    PositiveOrNone,
    PositiveOrZero,
    Settings,
    Share,
    require,
)


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Settings, table="train.compile."):
    """Settings for the use of `torch.compile` on the model. Arguments other than the first and last
    are torch's own."""

    enabled: bool = False
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool | None = None
    """None: the batch size alone is dynamic, so that a ragged last batch is no new program."""
    backend: str | Callable[..., Any] = "inductor"
    error_on_graph_break: bool = False
    """Raise at each graph break, with its place. For diagnosis."""
    on_failure: Literal["raise", "eager"] = "raise"
    """When the first compiled call fails: raise, or go on uncompiled with the reason in the
    result."""


@dataclass(frozen=True, kw_only=True)
class AmpConfig(Settings, table="train.amp."):
    """Mixed precision: the forward under autocast. float16 adds a loss scaler, as
    `torch.amp.GradScaler` scales."""

    dtype: Literal["bfloat16", "float16", None] = None
    """"bfloat16" or "float16"; None computes in the model's own."""
    init_scale: Positive = 65536.0
    """The first scale of the loss, in float16. It halves after a step with NaN or Inf gradients,
    which is skipped."""
    growth_interval: Count = 2000
    """Steps without any after which the scale doubles."""


@dataclass(frozen=True, kw_only=True)
class GradConfig(Settings, table="train.grad."):
    """Gradient statistics and clipping."""

    every: CountOrZero = 1
    """Measure the gradients of every n-th step of an epoch, the first included; 0 never
    measures."""
    clip_norm: PositiveOrNone = None
    """Clip the total gradient norm to this value before each step; None never clips."""
    vanishing: PositiveOrZero = 1e-7
    """A gradient tensor with a smaller L2 norm counts as vanishing."""
    exploding: PositiveOrZero = 100.0
    """A gradient tensor with a larger or non-finite L2 norm counts as exploding."""


@dataclass(frozen=True, kw_only=True)
class MeasuresConfig(Settings, table="train.measures."):
    """The measures besides loss and accuracy, in training and in evaluation, from the same read of
    the logits; `esper_kernels.Measured` defines the numbers."""

    per_class: CountOrZero = 0
    """The number of classes, for support, precision, recall and F1 of each; 0 leaves them out."""
    confusion: bool = False
    """Count the rows of each pair of target and prediction; needs per_class of at most 1,024."""
    calibration_bins: CountOrZero = 0
    """Bins of the largest probability, for calibration errors, the Brier score and the negative
    log-likelihood; 0 leaves them out."""
    entropy: bool = False
    """Entropy of the predictions, perplexity, and margin of the largest logit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.confusion or 0 < self.per_class <= 1024,
            "train.measures.confusion needs train.measures.per_class, the number of classes, in "
            "[1, 1024]",
            self.per_class,
        )

    @property
    def any(self) -> bool:
        return bool(self.per_class or self.calibration_bins or self.entropy)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, table="train."):
    """Settings of the epoch loop, the same for every way of training."""

    kernel: KernelConfig = field(default_factory=KernelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    grad: GradConfig = field(default_factory=GradConfig)
    measures: MeasuresConfig = field(default_factory=MeasuresConfig)
    accumulate: Count = 1
    """Batches per optimizer step. Their gradient is that of the mean over all their valid rows;
    with a criterion other than cross entropy, that of the mean over the batches."""
    capture: bool = False
    """Replay each step, from forward to optimizer, as one CUDA graph: captured after three steps,
    and anew when seeds, optimizers or settings change. The forward must do the same for every
    batch, since its Python code runs only at the capture; batches of another shape than the first
    run eagerly. Learning rates are float32 then."""
    linear_loss: bool = False
    """Train without the logits of a batch: the model's `features(inputs)` and its `output_layer`,
    an `nn.Linear`, go to the loss. Saves most of the memory of a large vocabulary. For classes last
    and cross entropy; batches with soft targets, batches on which seeds learn beside the network,
    and evaluation still compute the logits."""
    topk: tuple[Count, ...] = (1,)
    """Ranks k for which correct@k is counted; 1 is always among them."""
    on_bad_numbers: Literal["warn", "skip", "stop", "rollback"] = "stop"
    """NaN, infinity, divergence, bad targets: go on and report; report, and leave out steps with
    gradients that are not finite; end the run; or return to the last good state. Only "stop"
    refuses targets outside the classes, the others leave their rows out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        measured = self.on_bad_numbers != "skip" or self.grad.every == 1
        require(measured, "train.on_bad_numbers 'skip' needs train.grad.every = 1", self.grad.every)
        if self.capture:
            alone = not self.compile.enabled
            require(
                alone,
                "train.capture does not go with train.compile.enabled; leave one of them out",
                True,
            )
            measured = self.grad.clip_norm is None or self.grad.every == 1
            require(
                measured,
                "train.capture with train.grad.clip_norm needs train.grad.every = 1",
                self.grad.every,
            )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Settings, table="distributed."):
    """Training of one network by several processes, which `torchrun` starts. A batch is divided
    between them, so the network is the one that a single process would train."""

    strategy: Literal["none", "ddp", "fsdp2"] = "none"
    """"none" trains in one process. "ddp" gives each process the whole network and a part of each
    batch, and adds up the gradients. "fsdp2" also divides the parameters, and the optimizer's
    state, among the processes, and refuses a few settings (docs/distributed.md)."""
    check_every: CountOrZero = 1
    """Epochs between comparisons of the processes' networks, which have to be equal: a difference
    ends the run. 0 never compares."""
    timeout: Positive = 600.0
    """Seconds after which a process gives up waiting for the others."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings, table="optim.schedule."):
    """The schedule of learning rates, from when their optimizer is made to the end of the run."""

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
    """The momentum of SGD; AdamW keeps torch's own betas."""
    weight_decay: PositiveOrZero = 5e-4
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
