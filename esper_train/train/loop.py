"""The only loops over batches: `train_one_epoch` and `evaluate`, shared by every way of training.

`episode` calls them once an epoch; they also serve any `nn.Module` and loader on their own. Loss,
counts and gradient statistics stay on the device; each call reads them once, at its end, which is
its only host sync.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_kernels import GradHealth, Meter, MeterResult, compute_all
from esper_train.train.capture import Batch, Capture, CudaGraphs
from esper_train.train.config import TrainConfig
from esper_train.train.errors import NonFiniteLossError
from esper_train.train.learner import Learner
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.step import Criterion, Scope, Span, TrainStep, build_train_step
from esper_train.train.unit import Unit

Batches = Iterable[Batch]
_NETWORK = ""
"""The unit of all that no learner owns."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Loss and counts over the batches of one pass. A mean over nothing is NaN."""

    loss: float
    """Mean cross-entropy a valid row, in nats (of the criterion, where one of the caller's own was
    given)."""
    mean_batch_loss: float
    """Mean of the batches' mean losses."""
    accuracy: float
    """Valid rows whose largest logit is the target's, in percent."""
    correct: dict[int, int]
    """k to the number of valid rows whose target is among the k largest logits."""
    valid: int
    """Rows (tokens) that are not ignored."""
    nonfinite: int
    """Valid rows with NaN or infinite logits."""
    bad_targets: int
    """Rows left out because their target was outside the classes; see
    `TrainConfig.on_bad_numbers`."""
    batches: int


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
    """What learned beside the model, by name; `grad` and `skipped` are of the model alone."""
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
    """Which targets were predicted, in the order of the data; bool [rows or tokens], on the CPU."""
    variants: dict[str, Measures] = field(default_factory=dict)
    """The same data under each variant's alpha."""

    def contribution(self, variant: str) -> float | None:
        """Percentage points of accuracy that the variant lacks; None where it was not measured."""
        without = self.variants.get(variant)
        return None if without is None else self.accuracy - without.accuracy


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizers: OptimizerRegistry | Optimizer,
    config: TrainConfig,
    *,
    task_type: str,
    criterion: Criterion | None = None,
    max_batches: int | None = None,
    step: TrainStep | None = None,
    governed: bool = False,
    learners: Sequence[Learner] = (),
) -> EpochResult:
    """Train on every batch once.

    Args:
        model: maps inputs to logits; its parameters' device is where batches are copied to.
        loader: batches (inputs [N, ...], targets [N] or [N, T]).
        optimizers: a registry, whose groups the gradient statistics are reported by, or one
        optimizer.
        config: kernels, compilation, precision, gradients, batches a step.
        task_type: "classification" or "lm".
        criterion: see `build_train_step`.
        max_batches: stop after so many; None takes all.
        step: from `build_train_step` with the same task type, config and criterion, to keep a
            compiled one over epochs; None makes one for this call.
        governed: the caller judges the losses itself, as a run does by its governor: a loss that
            is not finite is returned under every policy, and the policy "rollback" is accepted.
        learners: what learns beside the model from the same batches.

    A model in eval mode is put into training mode. In a model in training mode, submodules in eval
    mode, such as a frozen batch norm, stay in it.

    Raises:
        NonFiniteLossError: with the policy "stop", the loss is NaN or infinite; the error's
            `result` is the `EpochResult`.
        TypeError: something that is no pair (inputs, targets) of tensors came from the loader.
        ValueError: unknown task type, `max_batches` below 1, a loader without batches, logits of
        another shape.
        IndexError: with the policy "stop", a target outside the classes: at once on a CPU, at the
            end of the epoch on other devices.
    """
    started = time.perf_counter()
    if isinstance(optimizers, Optimizer):
        optimizers = OptimizerRegistry(host=optimizers)
    if config.on_bad_numbers == "rollback" and not governed:
        raise ValueError(
            "train.on_bad_numbers 'rollback' needs a run, which keeps states to return to; use "
            "'stop', 'warn' or 'skip' with train_one_epoch"
        )
    step = _step(step, task_type, config, criterion)
    device = _device(model)
    capture = None
    for scaler in (step.scaler, *(learner.scaler for learner in learners)):
        if scaler is not None:
            scaler.to(device)

    def make() -> _Steps:
        return _Steps(model, optimizers, config, step, device, learners)

    if config.capture:
        capture = step.capture = step.capture or Capture(CudaGraphs(device))
        steps = capture.begin(model, optimizers, config, make)
        steps.reset()
    else:
        steps = make()
    run: Callable[[Sequence[Batch], bool], None] = capture.run if capture else steps
    if not model.training:
        model.train()
    batches = _batches(loader, None if capture else device, max_batches, step.span)
    for number, group in enumerate(iter(lambda: list(islice(batches, config.accumulate)), [])):
        run(
            group,
            step.scaler is not None or (config.grad.every > 0 and number % config.grad.every == 0),
        )
        optimizers.advance("step")
    if capture:
        capture.end()
    optimizers.advance("epoch")
    strict = config.on_bad_numbers == "stop"
    result, units = steps.read(strict)
    grad, left_out = units.pop(_NETWORK)
    epoch = EpochResult(
        **_measures(result),
        grad=grad,
        skipped=left_out,
        learners={
            name: LearnerResult(grad=health, skipped=n) for name, (health, n) in units.items()
        },
        seconds=time.perf_counter() - started,
        backend=step.backend(device),
        compiled=step.compiled,
        compile_failure=step.compile_failure,
        replayed=capture.replayed if capture else 0,
        not_replayed=dict(capture.eager) if capture else {},
    )
    if strict and not governed and _went_bad(epoch, scaled=step.scaler is not None):
        bad_gradients = epoch.grad.nan_count + epoch.grad.inf_count if epoch.grad else 0
        raise NonFiniteLossError(
            f"the training loss is {epoch.loss} and {bad_gradients} gradient entries were NaN or "
            "infinite; try a smaller learning rate or train.grad.clip_norm, or set "
            "train.on_bad_numbers to 'warn' or 'skip'",
            epoch,
        )
    return epoch


class _Steps:
    """Steps of the optimizers, each a call, and what they add up on the device until the epoch's
    end.

    A captured step finds all of this where it was, so it serves for more than one epoch then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerRegistry,
        config: TrainConfig,
        step: TrainStep,
        device: torch.device,
        learners: Sequence[Learner],
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._config = config
        self._step = step
        self._learners = learners
        self.meter = Meter(device, topk=config.topk)
        groups = optimizers.parameters()
        self._parameters = [p for members in groups.values() for p in members]
        self._units: dict[str, Unit] = {}
        apart = {id(buffer) for learner in learners for buffer in learner.buffers}
        for learner in learners:
            own = {name: groups.pop(name) for name in learner.groups}
            self._units[learner.start] = Unit(own, learner.buffers, learner.scaler, config, device)
        buffers = [buffer for buffer in model.buffers() if id(buffer) not in apart]
        self._units[_NETWORK] = Unit(groups, buffers, step.scaler, config, device)

    def reset(self) -> None:
        """Forget what was added up."""
        self.meter.reset()
        for unit in self._units.values():
            unit.reset()

    def read(self, strict: bool) -> tuple[MeterResult, dict[str, tuple[GradHealth | None, int]]]:
        """Loss and counts, and by name of the unit its gradients and skipped steps; the host
        sync."""
        units = self._units.values()
        sources = [source for unit in units for source in (unit.skipped, *unit.measured())]
        result, *read = compute_all(self.meter, *sources, strict=strict)
        found: dict[str, tuple[GradHealth | None, int]] = {}
        for name, unit in self._units.items():
            (skipped,), *health = read[: 1 + len(unit.measured())]
            del read[: 1 + len(health)]
            found[name] = _whole_epoch(*health) if health else None, skipped
        return result, found

    def __call__(self, group: Sequence[Batch], measure: bool) -> None:
        step = self._step
        optimizers = self._optimizers
        if self._config.capture:  # a graph finds gradients where they were
            for optimizer in optimizers.present():
                optimizer.zero_grad(set_to_none=False)
        else:
            for p in self._parameters:
                p.grad = None
        units = self._units.values()
        for unit in units:
            unit.begin()
        divisor = step.divisor([targets for _, targets in group])
        for inputs, targets in group:
            step(self._model, inputs, targets, self.meter, divisor, self._learners)
        if measure:
            with step.span("statistics"):
                for unit in units:
                    unit.measure()
        with step.span("optimizer"):
            for unit in units:
                unit.step(optimizers, measure)


def evaluate(
    model: nn.Module,
    loader: Batches,
    config: TrainConfig,
    *,
    task_type: str,
    criterion: Criterion | None = None,
    max_batches: int | None = None,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    scopes: Mapping[str, Scope] | None = None,
    step: TrainStep | None = None,
) -> EvalResult:
    """Measure the model without training it; its train/eval mode is restored.

    `variants` names alpha overrides (slot to alpha) under which the same batches are measured too,
    in the same pass: the model is called with `alpha=...` for each and nothing of it is changed.
    `scopes` has what is entered around the passes of some variants. Otherwise as `train_one_epoch`.
    """
    started = time.perf_counter()
    step = _step(step, task_type, config, criterion)
    device = _device(model)
    overrides = variants or {}
    meters = [Meter(device, topk=config.topk) for _ in range(1 + len(overrides))]
    alphas = list(overrides.values())
    entered = [(scopes or {}).get(name, nullcontext) for name in overrides]
    right: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # inference mode would hide what the model changes in place
        with torch.inference_mode(False), torch.no_grad():
            for inputs, targets in _batches(loader, device, max_batches, step.span):
                with step.span("evaluation"):
                    right.append(
                        step.measure(model, inputs, targets, meters, alphas, entered).flatten()
                    )
    finally:
        for module, training in modes:
            module.training = training
    rows = torch.cat(right).long()
    result, *others, predicted = compute_all(*meters, rows, strict=config.on_bad_numbers == "stop")
    return EvalResult(
        **_measures(result),
        right=torch.tensor(predicted, dtype=torch.bool),
        seconds=time.perf_counter() - started,
        backend=step.backend(device),
        variants={
            name: Measures(**_measures(other))
            for name, other in zip(overrides, others, strict=True)
        },
    )


def _batches(
    loader: Batches, device: torch.device | None, most: int | None, span: Span
) -> Iterator[Batch]:
    """The loader's batches, `most` of them at most, on `device`; None leaves them where they
    are."""
    if most is not None and most < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {most}")
    drawn = iter(islice(loader, most))
    end = object()
    empty = True
    while True:
        with span("data"):
            batch = next(drawn, end)
            if batch is end:
                break
            inputs, targets = _pair(batch)
            if device is not None:
                inputs = inputs.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
        empty = False
        yield inputs, targets
    if empty:
        raise ValueError(
            "the loader gave no batch: is the data set smaller than a batch with drop_last=True?"
        )


def _went_bad(epoch: EpochResult, *, scaled: bool) -> bool:
    """Whether the loss or, without a loss scaler, which skips such steps, a gradient was not
    finite."""
    gradients = 0 if epoch.grad is None else epoch.grad.nan_count + epoch.grad.inf_count
    loss_is_bad = epoch.valid > 0 and not math.isfinite(epoch.loss)
    return loss_is_bad or (gradients > 0 and not scaled)


def _pair(batch: object) -> Batch:
    """The batch, if it is a pair of tensors; `TypeError` says what came instead."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs, targets
    raise TypeError(
        f"expected batches (inputs, targets) of two tensors, got {_described(batch)} from the "
        "loader; leave broken samples out in its collate_fn, or make such pairs there"
    )


def _described(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} ({kinds})"
    return "None" if batch is None else f"a {type(batch).__name__}"


def _step(
    step: TrainStep | None, task_type: str, config: TrainConfig, criterion: Criterion | None
) -> TrainStep:
    """The caller's step, which must have been built from the same settings, or a new one."""
    if step is None:
        return build_train_step(task_type, config, criterion)
    step.require_match(task_type, config, criterion)
    return step


def _whole_epoch(last: GradHealth, counts: list[int]) -> GradHealth:
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


def _measures(result: MeterResult) -> dict[str, Any]:
    """The fields of `Measures`, with the accuracy in percent."""
    return {f.name: getattr(result, f.name) for f in fields(Measures)} | {
        "accuracy": 100.0 * result.accuracy
    }


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(
            "the model has no parameters, so there is nothing to train and no device to measure on"
        )
    return parameter.device
