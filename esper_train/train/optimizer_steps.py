"""The steps of an epoch's optimizers, and the sums that they keep on the device until its end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_kernels import GradHealth, GradStats, Meter, MeterResult
from esper_train.train.batches import Batch
from esper_train.train.config import TrainConfig
from esper_train.train.learner import Learner
from esper_train.train.loss import Divisor
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.ranks import GradientSum, Ranks
from esper_train.train.results import new_meter, whole_epoch
from esper_train.train.step import TrainStep
from esper_train.train.unit import Unit

if TYPE_CHECKING:  # importing it takes half as long as importing torch
    from esper_train.train.shards import Shards

NETWORK = ""
"""The name of the unit of the parameters that no learner owns."""


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
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._config = config
        self._step = step
        self._learners = learners
        self.meter = new_meter(config, device)
        self.saw_soft_targets = False
        groups = optimizers.parameters()
        self._parameters = [p for members in groups.values() for p in members]
        self._ranks = ranks
        shards = None if ranks is None else ranks.shards
        self._shards = shards
        self._add_up = None if ranks is None else GradientSum(ranks, self._parameters)
        units: dict[str, Unit] = {}
        apart = {id(buffer) for learner in learners for buffer in learner.buffers}
        for learner in learners:
            own = {name: groups.pop(name) for name in learner.groups}
            units[learner.start] = Unit(
                own, learner.buffers, learner.scaler, config, device, shards
            )
        buffers = [buffer for buffer in model.buffers() if id(buffer) not in apart]
        units[NETWORK] = Unit(groups, buffers, step.scaler, config, device, shards)
        self._names = tuple(units)
        self._units = tuple(units.values())

    def reset(self) -> None:
        """Set the sums to 0."""
        self.meter.reset()
        for unit in self._units:
            unit.reset()

    def sources(self) -> tuple[Meter | GradStats | Tensor, ...]:
        """The sums of the epoch, on the device."""
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
        if self._add_up is None:
            self._learn(group)
        elif self._shards is not None:
            self._learn_sharded(group, self._shards)
        else:
            self._add_up(self._learn_share(group))
        if measure:
            with step.spans.statistics:
                for unit in units:
                    unit.measure()
        with step.spans.optimizer:
            for unit in units:
                unit.step(optimizers, measure)

    def _learn(self, group: Sequence[Batch]) -> None:
        """Forward and backward of each batch."""
        divisor = None
        if len(group) > 1:
            divisor = self._step.loss.divisor([targets for _, targets in group])
        for inputs, targets in group:
            self._step(self._model, inputs, targets, self.meter, divisor, self._learners)

    def _learn_share(self, group: Sequence[Batch]) -> Tensor | float | None:
        """`_learn` for this rank's share of the batches, and by what its mean counts among those of
        the other ranks: the weight of its valid rows; with a criterion of the caller's own the
        number of rows; None for sums."""
        loss = self._step.loss
        group = [batch for batch in group if _rows(batch)]
        divisor = loss.divisor([targets for _, targets in group])
        seen = None if divisor is None else _Seen(divisor)
        for inputs, targets in group:
            self._step(self._model, inputs, targets, self.meter, seen, self._learners)
        if loss.own is not None:
            return float(sum(_rows(batch) for batch in group))
        return None if seen is None else seen.value

    def _learn_sharded(self, group: Sequence[Batch], shards: "Shards") -> None:
        """`_learn` for this rank's share of the batches, where the backward pass adds up the
        gradients of all ranks. A rank without rows runs on none of them, because it has to take
        part. Raises `Stopped` on every rank if one was asked to stop, on the CPU."""
        assert self._ranks is not None
        for batch in group:
            _rows(batch)
            if batch[1].is_floating_point():
                raise ValueError(
                    "distributed.strategy 'fsdp2' needs targets that are classes, got soft ones; "
                    "use 'ddp'"
                )
        divisor = self._step.loss.divisor([targets for _, targets in group])
        total = None if divisor is None else _Total(divisor, self._ranks)
        for inputs, targets in group:
            self._step(self._model, inputs, targets, self.meter, total, self._learners)
        shards.take_gradients()
        if total is not None:
            total.obey_stop()


class _Total:
    """A divisor added up over all ranks, with their requests to stop: one collective."""

    def __init__(self, divisor: Divisor, ranks: Ranks) -> None:
        self._divisor = divisor
        self._ranks = ranks
        self._sums: Tensor | None = None

    def __call__(self, classes: int) -> Tensor:
        if self._sums is None:
            weight = torch.as_tensor(self._divisor(classes)).double()
            asked = torch.full_like(weight, float(self._ranks.stop.signal is not None))
            self._sums = torch.stack([weight, asked])
            dist.all_reduce(self._sums)
        return self._sums[0]

    def obey_stop(self) -> None:
        """Raise `Stopped` if a rank was asked to stop. On other devices than the CPU reading that
        would be a host sync, so the end of the epoch does it."""
        if self._sums is not None and self._sums.is_cpu and self._sums[1].item() > 0:
            self._ranks.raise_stopped()


class _Seen:
    """A divisor that remembers what it gave; 0 before it was called."""

    def __init__(self, divisor: Divisor) -> None:
        self._divisor = divisor
        self.value: Tensor | float = 0.0

    def __call__(self, classes: int) -> Tensor | float:
        self.value = self._divisor(classes)
        return self.value


def _rows(batch: Batch) -> int:
    """Rows of a batch; `ValueError` for targets that do not say how many there are."""
    targets = batch[1]
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        raise ValueError(
            "with distributed.strategy, expected targets as a tensor with a row for each sample, "
            f"got a {type(targets).__name__}; pass batch= to make one, or train in one process"
        )
    return len(targets)
