"""The results of the loop: loss and counts of a pass, and the other measurements of an epoch."""

import math
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch import Tensor

from esper_kernels import GradHealth, Measured, Meter, MeterResult
from esper_train.train.config import TrainConfig
from esper_train.train.errors import NonFiniteLossError


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Loss and counts over the batches of one pass. A mean over nothing is NaN."""

    loss: float
    """Mean cross-entropy per valid row, in nats; of the caller's own criterion, where one was
    given."""
    mean_batch_loss: float
    """Mean of the batches' mean losses."""
    accuracy: float | None
    """Fraction (0..1) of valid rows whose largest logit is the target's; None for a regression."""
    correct: dict[int, int]
    """k to the number of valid rows whose target is among the k largest logits; empty for a
    regression."""
    valid: int
    """Rows (tokens) that are not ignored."""
    nonfinite: int
    """Valid rows with NaN or infinite logits (in a regression, outputs)."""
    bad_targets: int
    """Rows left out because their target was outside the classes; see
    `TrainConfig.on_bad_numbers`."""
    batches: int
    measured: Measured = field(default_factory=Measured)
    """The measures that `train.measures` asks for; those that were not measured are None."""

    @property
    def points(self) -> float:
        """The accuracy in percentage points, as gates and controllers use it; NaN for a
        regression."""
        return math.nan if self.accuracy is None else 100.0 * self.accuracy


class MeasuresFields(TypedDict):
    """The arguments of `Measures`, which results with more fields take too."""

    loss: float
    mean_batch_loss: float
    accuracy: float | None
    correct: dict[int, int]
    valid: int
    nonfinite: int
    bad_targets: int
    batches: int
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class LearnerResult:
    """One epoch of what learns beside the model; the fields are those of `EpochResult`."""

    grad: GradHealth | None
    skipped: int


@dataclass(frozen=True, kw_only=True)
class EpochResult(Measures):
    """One epoch of training."""

    grad: GradHealth | None
    """Gradients of the last measured step, by group, None if none was measured; the NaN and Inf
    counts (of the whole, not of the groups) are sums over the measured steps, and any of them makes
    the health 0."""
    skipped: int
    """Steps left out because gradients were not finite."""
    learners: dict[str, LearnerResult]
    """The results of what learned beside the model, by name; `grad` and `skipped` are those of the
    model alone."""
    seconds: float
    backend: str
    compiled: bool
    compile_failure: str | None
    replayed: int
    """Steps that were replays of a CUDA graph; see `TrainConfig.capture`."""
    not_replayed: dict[str, int]
    """Why other steps were not, and how many; empty without `capture`."""


@dataclass(frozen=True, kw_only=True)
class EvalResult(Measures):
    """One pass over held-out data."""

    seconds: float
    backend: str
    right: Tensor = field(repr=False, compare=False)
    """Whether each target was predicted, in the order of the data; bool [rows or tokens], on the
    CPU."""
    variants: dict[str, Measures] = field(default_factory=dict)
    """The same data under each variant's alpha."""

    def contribution(self, variant: str) -> float | None:
        """Percentage points of accuracy that the variant lost; None where it was not measured."""
        without = self.variants.get(variant)
        if without is None or without.accuracy is None:
            return None
        return self.points - without.points


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """The argument of `on_step`, after each optimizer step."""

    number: int
    """The number of the step within the epoch, from 1."""
    counts: bool = field(repr=False)
    meter: Meter = field(repr=False, compare=False)

    def measures(self) -> Measures:
        """Loss and counts of the epoch so far: a host sync."""
        return Measures(**measures_of(self.meter.compute(strict=False), self.counts))


def went_bad(epoch: EpochResult, *, scaled: bool) -> bool:
    """Whether the loss or, without a loss scaler, which skips such steps, a gradient was not
    finite."""
    gradients = 0 if epoch.grad is None else epoch.grad.nan_count + epoch.grad.inf_count
    loss_is_bad = epoch.valid > 0 and not math.isfinite(epoch.loss)
    return loss_is_bad or (gradients > 0 and not scaled)


def refuse_bad_numbers(epoch: EpochResult, *, scaled: bool) -> None:
    """Raise `NonFiniteLossError` where the loss or a gradient was not finite."""
    if went_bad(epoch, scaled=scaled):
        bad_gradients = epoch.grad.nan_count + epoch.grad.inf_count if epoch.grad else 0
        raise NonFiniteLossError(
            f"the training loss is {epoch.loss} and {bad_gradients} gradient entries were NaN or "
            "infinite; try a smaller learning rate or train.grad.clip_norm, or set "
            "train.on_bad_numbers to 'warn' or 'skip'",
            epoch,
        )


def whole_epoch(last: GradHealth, counts: list[int]) -> GradHealth:
    """The last measured step's health, with the NaN and Inf counts of all of them: zeros come
    first, by tensor."""
    tensors = len(counts) // 3
    nans = sum(counts[tensors : 2 * tensors])
    infs = sum(counts[2 * tensors :])
    return replace(
        last,
        nan_count=nans,
        inf_count=infs,
        gradient_health=0.0 if nans + infs else last.gradient_health,
    )


def measures_of(result: MeterResult, counts: bool) -> MeasuresFields:
    """The fields of `Measures`; `counts` says whether there are classes to count."""
    return {
        "loss": result.loss,
        "mean_batch_loss": result.mean_batch_loss,
        "accuracy": result.accuracy if counts else None,
        "correct": result.correct if counts else {},
        "valid": result.valid,
        "nonfinite": result.nonfinite,
        "bad_targets": result.bad_targets,
        "batches": result.batches,
        "measured": Measured(
            per_class=result.per_class,
            confusion=result.confusion,
            calibration=result.calibration,
            nll=result.nll,
            entropy=result.entropy,
            margin=result.margin,
        ),
    }


def new_meter(config: TrainConfig, device: torch.device) -> Meter:
    """A meter of what the config asks for."""
    return Meter(
        device,
        topk=config.topk,
        per_class=config.measures.per_class,
        calibration_bins=config.measures.calibration_bins,
        entropy=config.measures.entropy,
        confusion=config.measures.confusion,
    )
