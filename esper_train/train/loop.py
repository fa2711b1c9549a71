"""The only loops over batches: `train_one_epoch` and `evaluate`, shared by every way of training.

They serve any `nn.Module` and loader. Loss, counts and gradient statistics stay on the device; each
call reads them once, at its end, which is its only host sync. `run` calls `launch_training` and
`launch_evaluation` instead, which are the same without the reading, and reads both together.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_kernels import Meter
from esper_train.base.modes import evaluating
from esper_train.base.names import require_function, require_type
from esper_train.train.batches import Batch, Batches, ReadBatch, drawn, grouped
from esper_train.train.capture import Capture, CudaGraphs
from esper_train.train.config import TrainConfig
from esper_train.train.forward import ForwardOf
from esper_train.train.launched import Launched, Stopwatch
from esper_train.train.learner import Learner
from esper_train.train.loss import Criterion
from esper_train.train.optimizer_steps import NETWORK, OptimizerSteps
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.ranks import Ranks
from esper_train.train.results import (
    EpochResult,
    EvalResult,
    LearnerResult,
    Measures,
    StepEnd,
    measures_of,
    new_meter,
    refuse_bad_numbers,
)
from esper_train.train.step import Scope, TrainStep, build_train_step


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizers: OptimizerRegistry | Optimizer,
    config: TrainConfig,
    *,
    task_type: str,
    criterion: Criterion | None = None,
    forward: ForwardOf | None = None,
    batch: ReadBatch | None = None,
    max_batches: int | None = None,
    on_step: Callable[[StepEnd], object] | None = None,
    step: TrainStep | None = None,
    learners: Sequence[Learner] = (),
) -> EpochResult:
    """Train on every batch once.

    Args:
        model: maps inputs to logits: a tensor, `.logits`, `["logits"]` or the first of a tuple.
            Batches are moved to its parameters' device. In eval mode it is put into training mode;
            submodules in eval mode, such as a frozen batch norm, stay in it otherwise.
        loader: pairs (inputs, targets) or dicts, as `read_batch` says. A dict of inputs is passed
            as keyword arguments, a tuple or list as one argument after another.
        optimizers: one, or a registry, whose groups the gradient statistics are reported by.
        config: kernels, compilation, precision, gradients, batches per step.
        task_type, criterion, forward, batch: see `build_train_step`.
        max_batches: stop after so many; None takes all.
        on_step: called after each optimizer step. What it returns is ignored.
        step: from `build_train_step` with the same settings, to keep a compiled one over epochs;
            None makes one for this call.
        learners: what learns beside the model from the same batches.

    Raises:
        NonFiniteLossError: with the policy "stop", the loss is NaN or infinite; the error's
            `result` is the `EpochResult`.
        TypeError: an argument of another type; a batch or an output that is none of the above.
        ValueError: unknown task type, logits of another shape or that need no gradient, a loader
            without batches, `max_batches` below 1, an optimizer that needs a closure or holds none
            of the model's parameters, a call within `torch.no_grad()`.
        IndexError: with the policy "stop", a target outside the classes: at once on a CPU, at the
            end of the epoch on other devices.
    """
    require_type(model, nn.Module, "model")
    require_type(config, TrainConfig, "config")
    if config.on_bad_numbers == "rollback":
        raise ValueError(
            "train.on_bad_numbers 'rollback' needs a run, which keeps states to return to; use "
            "'stop', 'warn' or 'skip' with train_one_epoch"
        )
    if isinstance(optimizers, Optimizer):
        optimizers = OptimizerRegistry(host=optimizers)
    way_out = "pass a torch.optim.Optimizer, or OptimizerRegistry(name=optimizer, ...) for several"
    require_type(optimizers, OptimizerRegistry, "optimizers", way_out)
    require_function(on_step, "on_step", or_none=True)
    optimizers.require_parameters_of(model)
    step = _step(step, task_type, config, criterion, forward, batch)
    epoch = launch_training(
        model,
        loader,
        optimizers,
        config,
        step=step,
        learners=learners,
        max_batches=max_batches,
        on_step=on_step,
    ).read()
    if config.on_bad_numbers == "stop":
        refuse_bad_numbers(epoch, scaled=step.scaler is not None)
    return epoch


def launch_training(
    model: nn.Module,
    loader: Batches,
    optimizers: OptimizerRegistry,
    config: TrainConfig,
    *,
    step: TrainStep,
    learners: Sequence[Learner] = (),
    max_batches: int | None = None,
    on_step: Callable[[StepEnd], object] | None = None,
    ranks: Ranks | None = None,
) -> Launched[EpochResult]:
    """`train_one_epoch` without its host sync. The caller judges the losses itself: one that is not
    finite is returned under every policy.

    With `ranks`, the loader gives this rank's share of each batch, and every step and the result
    are those of all ranks.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "expected gradients to be enabled, got a call of train_one_epoch within "
            "torch.no_grad() or torch.inference_mode(); leave it, or use evaluate"
        )
    if learners and step.forward is not None:
        raise ValueError(
            f"learners call the model's own forward, got forward={step.forward!r}; leave it out"
        )
    device = _device(model)
    watch = Stopwatch(device)
    steps = _train(model, loader, optimizers, config, step, learners, max_batches, on_step, ranks)
    if ranks is not None:
        steps.meter.all_reduce()
        ranks.copy_first(model.buffers())
    watch.stop()
    return _training_to_read(steps, step, config, device, watch)


def _train(
    model: nn.Module,
    loader: Batches,
    optimizers: OptimizerRegistry,
    config: TrainConfig,
    step: TrainStep,
    learners: Sequence[Learner],
    max_batches: int | None,
    on_step: Callable[[StepEnd], object] | None,
    ranks: Ranks | None,
) -> OptimizerSteps:
    """Train on every batch; the sums of the steps stay on the device."""
    device = _device(model)
    for scaler in (step.scaler, *(learner.scaler for learner in learners)):
        if scaler is not None:
            scaler.to(device)

    def make() -> OptimizerSteps:
        return OptimizerSteps(model, optimizers, config, step, device, learners, ranks)

    capture = None
    if config.capture:
        capture = step.capture = step.capture or Capture(CudaGraphs(device))
        steps = capture.begin(model, optimizers, config, make)
        steps.reset()
    else:
        steps = make()
    run: Callable[[Sequence[Batch], bool], None] = capture.run if capture else steps
    if not model.training:
        model.train()
    step.loss.saw_soft_targets = False
    batches = drawn(loader, None if capture else device, max_batches, step.spans.data, step.batch)
    every = config.grad.every
    for number, group in enumerate(grouped(batches, config.accumulate)):
        run(group, step.scaler is not None or (every > 0 and number % every == 0))
        optimizers.advance("step")
        if on_step is not None:
            on_step(StepEnd(number=number + 1, counts=step.loss.counts, meter=steps.meter))
    if capture:
        capture.end()
    optimizers.advance("epoch")
    # replays repeat what was captured in an earlier epoch, without the step's Python code
    steps.saw_soft_targets |= step.loss.saw_soft_targets
    step.loss.saw_soft_targets = steps.saw_soft_targets
    return steps


def _training_to_read(
    steps: OptimizerSteps,
    step: TrainStep,
    config: TrainConfig,
    device: torch.device,
    watch: Stopwatch,
) -> Launched[EpochResult]:
    """The sums of an epoch, not read yet."""
    counts = step.loss.counts
    backend = step.backend(device)
    capture = step.capture if config.capture else None

    def result(read: Sequence[Any]) -> EpochResult:
        meter, units = steps.results(read)
        grad, skipped = units.pop(NETWORK)
        return EpochResult(
            **measures_of(meter, counts),
            grad=grad,
            skipped=skipped,
            learners={
                name: LearnerResult(grad=health, skipped=n) for name, (health, n) in units.items()
            },
            seconds=watch.seconds(),
            backend=backend,
            compiled=step.compiled,
            compile_failure=step.compile_failure,
            replayed=capture.replayed if capture else 0,
            not_replayed=dict(capture.eager) if capture else {},
        )

    strict = config.on_bad_numbers == "stop"
    return Launched(sources=steps.sources(), strict=strict, result=result)


def evaluate(
    model: nn.Module,
    loader: Batches,
    config: TrainConfig,
    *,
    task_type: str,
    criterion: Criterion | None = None,
    forward: ForwardOf | None = None,
    batch: ReadBatch | None = None,
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
    require_type(model, nn.Module, "model")
    require_type(config, TrainConfig, "config")
    require_type(variants, Mapping, "variants", or_none=True)
    step = _step(step, task_type, config, criterion, forward, batch)
    launched = launch_evaluation(
        model, loader, config, step=step, max_batches=max_batches, variants=variants, scopes=scopes
    )
    return launched.read()


def launch_evaluation(
    model: nn.Module,
    loader: Batches,
    config: TrainConfig,
    *,
    step: TrainStep,
    max_batches: int | None = None,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    scopes: Mapping[str, Scope] | None = None,
) -> Launched[EvalResult]:
    """`evaluate` without its host sync."""
    device = _device(model)
    watch = Stopwatch(device)
    step.loss.saw_soft_targets = False
    overrides = dict(variants or {})
    meters = [new_meter(config, device), *(Meter(device, topk=config.topk) for _ in overrides)]
    alphas = list(overrides.values())
    entered = [(scopes or {}).get(name, nullcontext) for name in overrides]
    right: list[Tensor] = []
    # inference mode would hide what the model changes in place
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        for inputs, targets in drawn(loader, device, max_batches, step.spans.data, step.batch):
            with step.spans.evaluation:
                right.append(
                    step.measure(model, inputs, targets, meters, alphas, entered).flatten()
                )
    rows = torch.cat(right).long()
    watch.stop()
    counts = step.loss.counts
    backend = step.backend(device)

    def result(read: Sequence[Any]) -> EvalResult:
        own, *others, predicted = read
        return EvalResult(
            **measures_of(own, counts),
            right=torch.tensor(predicted, dtype=torch.bool, device="cpu"),
            seconds=watch.seconds(),
            backend=backend,
            variants={
                name: Measures(**measures_of(other, counts))
                for name, other in zip(overrides, others, strict=True)
            },
        )

    strict = config.on_bad_numbers == "stop"
    return Launched(sources=(*meters, rows), strict=strict, result=result)


def _step(
    step: TrainStep | None,
    task_type: str,
    config: TrainConfig,
    criterion: Criterion | None,
    forward: ForwardOf | None,
    batch: ReadBatch | None,
) -> TrainStep:
    """The caller's step, or a new one.

    `ValueError` where the caller's was built for something else. Of the config, only the settings
    that a step itself obeys have to be the same, and None stands for what the step has.
    """
    if step is None:
        return build_train_step(task_type, config, criterion, forward=forward, batch=batch)
    require_type(step, TrainStep, "step", "build_train_step makes one")
    pairs: list[tuple[str, object, object]] = [
        ("task_type", task_type, step.loss.task_type),
        ("criterion", criterion, step.loss.criterion),
        ("forward", forward, step.forward),
        ("batch", batch, step.batch),
    ]
    pairs += [
        (f"config.{name}", getattr(config, name), getattr(step.config, name))
        for name in ("kernel", "compile", "amp", "on_bad_numbers")
    ]
    for name, asked, built in pairs:
        if asked is not None and asked is not built and asked != built:
            raise ValueError(
                f"step was built with {name}={built!r}, got {name}={asked!r}; pass the same one, "
                "or leave step out to have one built"
            )
    return step


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(
            "the model has no parameters, so there is nothing to train and no device to measure on"
        )
    return parameter.device
