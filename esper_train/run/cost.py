"""The cost of training in multiply-adds, counted by torch: that of a seed beside its host, for
which `epoch` asks once per seed, and that of a whole run."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper_train.base.state import PlainState
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
    """The part of `learning` in the seed itself."""

    @property
    def ratio(self) -> float:
        """The cost of an epoch with this seed in TRAINING, as a multiple of that of an epoch
        without it."""
        return 1.0 + self.learning / self.host

    def to_plain(self) -> dict[str, Any]:
        """The numbers as plain values, for an event."""
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


class TrainingCost(PlainState):
    """The cost of a run's training so far. An epoch of the host without a seed costs 1."""

    STATE = ("epochs",)

    def __init__(self) -> None:
        self.epochs = 0.0
        self.known: dict[tuple[str, str | None, str], float] = {}
        """Slot, blueprint and part of a seed to what it adds to an epoch. Runs with the same host
        and the same batches may share it."""

    def add_epoch(self, model: MorphModel, inputs: Any) -> None:
        """Add an epoch of the network as it is, trained with batches like `inputs`."""
        self.epochs += 1.0
        for slot in model.slots:
            if slot.seed is not None:
                key = slot.state.slot, slot.state.blueprint, slot.part
                if key not in self.known:
                    self.known[key] = added_cost(model, slot.state.slot, inputs)
                self.epochs += self.known[key]


def added_cost(model: MorphModel, slot: str, inputs: Any) -> float:
    """Multiply-adds that the seed of a slot adds to a step of the host, as a multiple of that step:
    those of its own pass if it learns beside the network, otherwise those of its part in the
    network. The other slots are left out, so that costs add up."""
    model = copy.deepcopy(model).train()
    without = {each.state.slot: 0.0 for each in model.slots}
    alone = {**without, slot: 1.0}
    seed = model.slot(slot).seed
    assert seed is not None
    parameters = [p for p in seed.parameters() if p.requires_grad]
    with torch.random.fork_rng(), torch.enable_grad():
        _, entered = call(model.forward_feeding, inputs, {})

        def step(alpha: Mapping[str, float]) -> None:
            logits_of(call(model, inputs, {"alpha": alpha})).sum().backward()

        def learn() -> None:
            out = model(entered[slot], alpha=alone, start=slot)
            logits_of(out).sum().backward(inputs=parameters)

        host = _multiply_adds(lambda: step(without))
        if slot not in entered:
            added = _multiply_adds(lambda: step(alone)) - host
        else:
            added = _multiply_adds(learn) if parameters else 0
    return added / host if host else 0.0


def multiply_adds(model: MorphModel, inputs: Any) -> int:
    """Multiply-adds of a training step of the network as it is, forward and backward, for a batch
    like `inputs`. Seeds in TRAINING have passes of their own, which are not in it."""
    model = copy.deepcopy(model).train()
    with torch.random.fork_rng(), torch.enable_grad():
        return _multiply_adds(lambda: logits_of(call(model, inputs, {})).sum().backward())


def _multiply_adds(work: Callable[[], None]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() // 2
