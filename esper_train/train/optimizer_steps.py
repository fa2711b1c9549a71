"""The steps of an epoch's optimizers, and the sums that they keep on the device until its end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_kernels import GradHealth, GradStats, Meter, MeterResult
from esper_train.train.batches import Batch
from esper_train.train.config import TrainConfig
from esper_train.train.learner import Learner
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.results import whole_epoch
from esper_train.train.step import TrainStep
from esper_train.train.unit import Unit

NETWORK = ""
"""Name of the unit of all that no learner owns."""


class OptimizerSteps:
    """One call per optimizer step: forward and backward of its batches, gradient statistics, and
    the step itself.

    Under capture all of this stays at its addresses, so the object then serves for several epochs.
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
        self.saw_soft_targets = False
        groups = optimizers.parameters()
        self._parameters = [p for members in groups.values() for p in members]
        units: dict[str, Unit] = {}
        apart = {id(buffer) for learner in learners for buffer in learner.buffers}
        for learner in learners:
            own = {name: groups.pop(name) for name in learner.groups}
            units[learner.start] = Unit(own, learner.buffers, learner.scaler, config, device)
        buffers = [buffer for buffer in model.buffers() if id(buffer) not in apart]
        units[NETWORK] = Unit(groups, buffers, step.scaler, config, device)
        self._names = tuple(units)
        self._units = tuple(units.values())

    def reset(self) -> None:
        """Forget what was added up."""
        self.meter.reset()
        for unit in self._units:
            unit.reset()

    def sources(self) -> tuple[Meter | GradStats | Tensor, ...]:
        """What was added up, on the device."""
        units = [source for unit in self._units for source in (unit.skipped, *unit.measured())]
        return (self.meter, *units)

    def results(
        self, read: Sequence[Any]
    ) -> tuple[MeterResult, dict[str, tuple[GradHealth | None, int]]]:
        """Loss and counts, and each unit's gradient health and skipped steps by its name, from what
        was read of `sources`."""
        result, *rest = read
        found: dict[str, tuple[GradHealth | None, int]] = {}
        for name, unit in zip(self._names, self._units, strict=True):
            (skipped,), *health = rest[: 1 + len(unit.measured())]
            del rest[: 1 + len(health)]
            found[name] = whole_epoch(*health) if health else None, skipped
        return result, found

    def __call__(self, group: Sequence[Batch], measure: bool) -> None:
        """One step on these batches; `measure` says whether to measure their gradients."""
        step = self._step
        optimizers = self._optimizers
        units = self._units
        if self._config.capture:  # a graph expects gradients at the same addresses
            for optimizer in optimizers.present():
                optimizer.zero_grad(set_to_none=False)
        else:
            for p in self._parameters:
                p.grad = None
        if self._config.on_bad_numbers == "skip":
            for unit in units:
                unit.keep_buffers()
        divisor = None
        if len(group) > 1:
            divisor = step.loss.divisor([targets for _, targets in group])
        for inputs, targets in group:
            step(self._model, inputs, targets, self.meter, divisor, self._learners)
        if measure:
            with step.spans.statistics:
                for unit in units:
                    unit.measure()
        with step.spans.optimizer:
            for unit in units:
                unit.step(optimizers, measure)
