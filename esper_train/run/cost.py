"""What a seed that trains costs beside its host, in multiply-adds counted by torch. `epoch` asks
once per seed."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper_train.morph.model import MorphModel
from esper_train.train.forward import call, logits_of


@dataclass(frozen=True, kw_only=True)
class SeedCost:
    """Multiply-adds for one batch, forward and backward."""

    host: int
    """A step of the network without the seed's own pass."""
    learning: int
    """The seed's own pass: through the seed, and through what lies after its slot."""
    seed: int
    """Of that, the seed alone."""

    @property
    def ratio(self) -> float:
        """What an epoch costs with this seed in TRAINING, as a multiple of one without."""
        return 1.0 + self.learning / self.host

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for an event."""
        return asdict(self) | {"ratio": self.ratio}


def seed_cost(model: MorphModel, slot: str, inputs: Any) -> SeedCost:
    """Count the work of a batch like `inputs`, on a copy of the model."""
    model = copy.deepcopy(model).train()
    seed = model.slot(slot).seed
    assert seed is not None
    parameters = [p for p in seed.parameters() if p.requires_grad]
    with torch.random.fork_rng(), torch.enable_grad():
        _, entered = call(model.forward_feeding, inputs, {})
        features = entered.get(slot)

        def host() -> None:
            logits_of(call(model, inputs, {})).sum().backward()

        if features is None or not parameters:
            return SeedCost(host=_multiply_adds(host), learning=0, seed=0)

        def learn() -> None:
            out = model(features, alpha={slot: 1.0}, start=slot)
            logits_of(out).sum().backward(inputs=parameters)

        def seed_alone() -> None:
            seed(features).sum().backward(inputs=parameters)

        return SeedCost(
            host=_multiply_adds(host),
            learning=_multiply_adds(learn),
            seed=_multiply_adds(seed_alone),
        )


def _multiply_adds(work: Callable[[], None]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() // 2
