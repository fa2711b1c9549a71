"""A seed in TRAINING learns beside the network without changing it: its pass is isolated here.

`model` makes `Statistics` for each slot whose seed is in TRAINING; `run` enters `incubating` around
the seed's own pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class Statistics(nn.Module):
    """Running statistics of the host's batch norms behind a slot, with its seed at alpha 1.

    They start as copies of the network's own and are updated by the seed's passes, so that the seed
    is measured with statistics that belong to it. The network's own are never modified.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.norms = tuple(
            m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats
        )
        for number, norm in enumerate(self.norms):
            for name in RUNNING:
                self.register_buffer(f"{name}_{number}", getattr(norm, name).clone())

    @contextmanager
    def bound(self) -> Iterator[None]:
        """A context in which the batch norms use these statistics and, in training mode, update
        them."""
        own = [dict(norm._buffers) for norm in self.norms]
        try:
            for number, norm in enumerate(self.norms):
                norm._buffers.update({name: self._buffers[f"{name}_{number}"] for name in RUNNING})
            yield
        finally:
            for norm, buffers in zip(self.norms, own, strict=True):
                norm._buffers.update(buffers)


class Incubation:
    """The context of the pass of one seed.

    `behind` are the modules that run after its slot. Inside `entered`, the host's batch norms use
    `statistics`; all other modules are in eval mode, so that dropout is off, and their buffers are
    copies.
    """

    def __init__(self, behind: Iterable[nn.Module], statistics: Statistics) -> None:
        norms = set(statistics.norms)
        self._others = [m for m in behind if m not in norms and not isinstance(m, Statistics)]
        self._buffers = [
            (module, name)
            for module in self._others
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._statistics = statistics

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The context of one pass; leaving it restores everything, also after an error."""
        training = [module for module in self._others if module.training]
        own: list[tuple[nn.Module, str, Tensor | None]] = []
        try:
            for module, name in self._buffers:
                buffer = module._buffers[name]
                own.append((module, name, buffer))
                assert buffer is not None
                module._buffers[name] = buffer.clone()
            for module in training:
                module.training = False
            with self._statistics.bound():
                yield
        finally:
            for module in training:
                module.training = True
            for module, name, buffer in own:
                module._buffers[name] = buffer
