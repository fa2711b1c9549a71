"""Groups of parameters that take their steps together: one flag, one loss scale, one norm.

The network is one unit and each `Learner` another, so that bad or large gradients of one never
skip, scale or clip the step of the other. `loop` makes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from esper_kernels import GradStats, clip_grad_norm_, grad_stats
from esper_train.train.amp import LossScaler
from esper_train.train.config import TrainConfig
from esper_train.train.optimizers import OptimizerRegistry

if TYPE_CHECKING:  # importing it takes half as long as importing torch
    from esper_train.train.shards import Shards


class Unit:
    """Measures, clips and steps some groups of a registry, and adds up what it measured."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[Tensor]],
        buffers: Iterable[Tensor],
        scaler: LossScaler | None,
        config: TrainConfig,
        device: torch.device,
        shards: "Shards | None" = None,
    ) -> None:
        self._groups = groups
        self._buffers = list(buffers)
        self._before: list[tuple[Tensor, Tensor]] = []
        self._parameters = [p for members in groups.values() for p in members]
        self._scaler = scaler
        self._config = config
        self._shards = shards
        acts_on_them = config.grad.clip_norm is not None or config.on_bad_numbers == "skip"
        self._joins_each_step = shards is not None and acts_on_them
        self._joined = False
        self._stats: GradStats | None = None
        self._counts: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps left out because gradients were not finite."""

    def reset(self) -> None:
        """Forget what was added up."""
        self.skipped.zero_()
        if self._counts is not None:
            self._counts.zero_()

    def measured(self) -> list[GradStats | Tensor]:
        """Statistics of the last measured step, and the counts of zeros, NaN and Inf by tensor
        over all measured steps, int64 [3, T]; empty where none was measured. Where ranks divide
        the gradients, all of them have to call this: it is a collective unless each step was."""
        if self._stats is None or self._counts is None:
            return []
        if self._shards is not None and not self._joined:
            self._stats = self._shards.measured(self._stats, self._parameters, self._counts)
            self._joined = True
        return [self._stats, self._counts]

    def keep_buffers(self) -> None:
        """Before the batches of a step that may be skipped: remember the buffers, which a skipped
        step must not change."""
        self._before = [(buffer, buffer.clone()) for buffer in self._buffers]

    def measure(self) -> None:
        """Measure the gradients as they are now. `TypeError` for sparse and complex ones."""
        inv_scale = None if self._scaler is None else self._scaler.inv_scale()
        try:
            stats = grad_stats(
                {name: [p.grad for p in members] for name, members in self._groups.items()},
                vanishing=self._config.grad.vanishing,
                exploding=self._config.grad.exploding,
                inv_scale=inv_scale,
                config=self._config.kernel,
                out=self._stats,
            )
        except TypeError as error:
            raise TypeError(
                f"the gradients cannot be measured: {error}; make them dense and real, or train "
                "without their statistics, with train.grad.every = 0"
            ) from error
        if self._shards is not None and self._joins_each_step:
            stats = self._shards.measured(stats, self._parameters)
        self._joined = self._joins_each_step
        self._stats = stats
        if self._counts is None:
            self._counts = torch.zeros_like(stats.counts)
        self._counts.add_(stats.counts)

    def step(self, optimizers: OptimizerRegistry, measured: bool) -> None:
        """Clip and step, or leave the step out; `measured` says that `measure` saw these
        gradients."""
        clip_norm = self._config.grad.clip_norm
        scaler = self._scaler
        if clip_norm is not None:
            stats = self._stats if measured else None
            if self._shards is not None and stats is not None:
                clip_grads_with_norm_(self._parameters, clip_norm, stats.total_norm)
            else:
                clip_grad_norm_(
                    self._parameters, clip_norm, stats=stats, config=self._config.kernel
                )
        skips = self._config.on_bad_numbers == "skip"
        if self._stats is None or not (skips or scaler is not None):
            optimizers.step(self._groups)
            return
        found = self._stats.found_inf
        self.skipped += found != 0
        optimizers.step_unless(found, None if scaler is None else scaler.scale, self._groups)
        for buffer, before in self._before:
            buffer.copy_(torch.where(found != 0, before, buffer))
        if scaler is not None:
            scaler.update(found)
