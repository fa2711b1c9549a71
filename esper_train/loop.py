"""The only loops over batches: `train_one_epoch` and `evaluate`, shared by every way of training.

`episode` calls them once an epoch; they also serve any `nn.Module` and loader on their own. Loss, counts and
gradient statistics stay on the device; each call reads them once, at its end, which is its only host sync.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_kernels import GradHealth, GradStats, Meter, MeterResult, clip_grad_norm_, compute_all, grad_stats
from esper_train.config import TrainConfig
from esper_train.optimizers import OptimizerRegistry
from esper_train.step import Criterion, TrainStep, build_train_step

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Loss and counts over the batches of one pass. A mean over nothing is NaN."""

    loss: float
    """Mean cross-entropy a valid row, in nats (of the criterion, where one of the caller's own was given)."""
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
    """Rows left out because their target was outside the classes; see `TrainConfig.on_bad_numbers`."""
    batches: int


@dataclass(frozen=True, kw_only=True)
class EpochResult(Measures):
    """One epoch of training."""

    grad: GradHealth | None
    """Gradients of the last measured batch, by group, None if none was measured; the NaN and Inf counts (of the
    whole, not of the groups) are sums over the measured batches, and any of them makes the health 0."""
    skipped: int
    """Steps left out because gradients were not finite."""
    seconds: float
    backend: str
    compiled: bool
    compile_failure: str | None


@dataclass(frozen=True, kw_only=True)
class EvalResult(Measures):
    """One pass over held-out data."""

    seconds: float
    backend: str
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
) -> EpochResult:
    """Train on every batch once.

    Args:
        model: maps inputs to logits; its parameters' device is where batches are copied to.
        loader: batches (inputs [N, ...], targets [N] or [N, T]).
        optimizers: a registry, whose groups the gradient statistics are reported by, or one optimizer.
        config: kernels, compilation, gradients.
        task_type: "classification" or "lm".
        criterion: see `build_train_step`.
        max_batches: stop after so many; None takes all.
        step: from `build_train_step`, to keep a compiled one over epochs; None makes one for this call.

    Raises:
        ValueError: unknown task type, `max_batches` below 1, a loader without batches, logits of another shape.
        IndexError: with the policy "stop", a target outside the classes: at once on a CPU, at the end of the epoch
            on other devices.
    """
    started = time.perf_counter()
    if isinstance(optimizers, Optimizer):
        optimizers = OptimizerRegistry(host=optimizers)
    step = step or build_train_step(task_type, config, criterion)
    device, grad, kernel = _device(model), config.grad, config.kernel
    meter = Meter(device, topk=config.topk)
    stats: GradStats | None = None
    nonfinite = torch.zeros(2, dtype=torch.int64, device=device)  # NaN, Inf
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    policy = config.on_bad_numbers
    model.train()
    for number, (inputs, targets) in enumerate(_batches(loader, device, max_batches)):
        optimizers.zero_grad()
        # a batch that is skipped must not stay in running statistics either
        buffers = [(b, b.clone()) for b in model.buffers()] if policy == "skip" else []
        step(model, inputs, targets, meter)
        groups = optimizers.parameters()
        measure = grad.every > 0 and number % grad.every == 0
        if measure:
            grads = {group: [p.grad for p in members] for group, members in groups.items()}
            stats = grad_stats(grads, vanishing=grad.vanishing, exploding=grad.exploding, config=kernel, out=stats)
            nonfinite[0] += stats.nans.sum()
            nonfinite[1] += stats.infs.sum()
        if grad.clip_norm is not None:
            flat = [p for members in groups.values() for p in members]
            clip_grad_norm_(flat, grad.clip_norm, stats=stats if measure else None, config=kernel)
        if policy == "skip" and stats is not None:
            skipped += stats.found_inf != 0
            optimizers.step_unless(stats.found_inf)
            for buffer, before in buffers:
                buffer.copy_(torch.where(stats.found_inf != 0, before, buffer))
        else:
            optimizers.step()
    measured, strict = [] if stats is None else [stats], policy == "stop"
    result, (nans, infs), (left_out,), *health = compute_all(meter, nonfinite, skipped, *measured, strict=strict)
    spoilt = {"gradient_health": 0.0} if nans or infs else {}
    return EpochResult(
        **_measures(result),
        grad=replace(health[0], nan_count=nans, inf_count=infs, **spoilt) if health else None,
        skipped=left_out,
        seconds=time.perf_counter() - started,
        backend=step.backend(device),
        compiled=step.compiled,
        compile_failure=step.compile_failure,
    )


def evaluate(
    model: nn.Module,
    loader: Batches,
    config: TrainConfig,
    *,
    task_type: str,
    criterion: Criterion | None = None,
    max_batches: int | None = None,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    step: TrainStep | None = None,
) -> EvalResult:
    """Measure the model without training it; its train/eval mode is restored.

    `variants` names alpha overrides (slot to alpha) under which the same batches are measured too, in the same
    pass: the model is called with `alpha=...` for each and nothing of it is changed. Otherwise as
    `train_one_epoch`.
    """
    started = time.perf_counter()
    step = step or build_train_step(task_type, config, criterion)
    device = _device(model)
    overrides = variants or {}
    meter, *meters = (Meter(device, topk=config.topk) for _ in range(1 + len(overrides)))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for inputs, targets in _batches(loader, device, max_batches):
                step.measure(model, inputs, targets, meter)
                for alpha, other in zip(overrides.values(), meters, strict=True):
                    step.measure(model, inputs, targets, other, alpha=alpha)
    finally:
        model.train(was_training)
    result, *others = compute_all(meter, *meters, strict=config.on_bad_numbers == "stop")
    return EvalResult(
        **_measures(result),
        seconds=time.perf_counter() - started,
        backend=step.backend(device),
        variants={name: Measures(**_measures(other)) for name, other in zip(overrides, others, strict=True)},
    )


def _batches(loader: Batches, device: torch.device, max_batches: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {max_batches}")
    empty = True
    for inputs, targets in islice(loader, max_batches):
        empty = False
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    if empty:
        raise ValueError("the loader gave no batch: is the data set smaller than a batch with drop_last=True?")


def _measures(result: MeterResult) -> dict[str, Any]:
    """The fields of `Measures`, with the accuracy in percent."""
    return {f.name: getattr(result, f.name) for f in fields(Measures)} | {"accuracy": 100.0 * result.accuracy}


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameters, so there is nothing to train and no device to measure on")
    return parameter.device
