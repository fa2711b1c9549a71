"""Several epochs of a user's model: train, validate, and return the results."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from esper_train.base.names import require_function, require_type
from esper_train.train.batches import Batches, ReadBatch, require_batches
from esper_train.train.config import TrainConfig
from esper_train.train.forward import ForwardOf
from esper_train.train.loop import evaluate, train_one_epoch
from esper_train.train.loss import Criterion
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.results import EpochResult, EvalResult, StepEnd
from esper_train.train.step import build_train_step


@dataclass(frozen=True, kw_only=True)
class EpochEnd:
    """The argument of `on_epoch`, after each epoch."""

    number: int
    """The number of the epoch, counted from 1."""
    train: EpochResult
    """What `train_one_epoch` returned."""
    validation: EvalResult | None
    """What `evaluate` measured on the validation data; None where none were given."""


def fit(
    model: nn.Module,
    loader: Batches,
    optimizers: OptimizerRegistry | Optimizer,
    config: TrainConfig,
    *,
    task_type: str,
    epochs: int,
    validation: Batches | None = None,
    criterion: Criterion | None = None,
    forward: ForwardOf | None = None,
    batch: ReadBatch | None = None,
    on_step: Callable[[StepEnd], object] | None = None,
    on_epoch: Callable[[EpochEnd], bool | None] | None = None,
) -> list[EpochEnd]:
    """Train for some epochs, and measure the model on `validation` after each.

    on_epoch: called after each epoch; training ends early where it returns True. It may change
        the model and the optimizers: keep the best weights, step a schedule of its own.

    Other arguments and what is raised: as for `train_one_epoch`. Both loaders are iterated anew in
    each epoch. For a progress bar, pass a loader that draws one, such as `tqdm.tqdm(loader)`.
    """
    if type(epochs) is not int or epochs < 1:
        error = ValueError if type(epochs) is int else TypeError
        raise error(f"epochs must be an int of at least 1, got {epochs!r}")
    require_type(config, TrainConfig, "config")
    require_function(on_epoch, "on_epoch", or_none=True)
    require_batches(loader)
    if validation is not None:
        require_batches(validation)
    step = build_train_step(task_type, config, criterion, forward=forward, batch=batch)
    if isinstance(optimizers, Optimizer):
        optimizers = OptimizerRegistry(host=optimizers)
    done: list[EpochEnd] = []
    for number in range(1, epochs + 1):
        trained = train_one_epoch(
            model, loader, optimizers, config, task_type=task_type, step=step, on_step=on_step
        )
        measured = None
        if validation is not None:
            measured = evaluate(model, validation, config, task_type=task_type, step=step)
        done.append(EpochEnd(number=number, train=trained, validation=measured))
        if on_epoch is not None and on_epoch(done[-1]):
            break
    return done
