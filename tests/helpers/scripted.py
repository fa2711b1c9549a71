"""Helpers for tests of whole runs: a scripted controller, a sink that stores its events, strict
JSON."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from esper_train import (
    Decision,
    EpisodeResult,
    Event,
    EventType,
    GrowthConfig,
    Op,
    Policy,
    Signals,
    TelemetryHub,
)
from esper_train.base.state import PlainState
from esper_train.run.checkpoint import Checkpoints
from esper_train.run.episode import Episode
from esper_train.run.run import run_episode

# a seed's whole life in few epochs: no threshold asks for a gain
EASY = GrowthConfig(
    window=1,
    training_min_epochs=3,
    blending_potential=-100.0,
    blending_loss_change=1e9,
    blending_epochs=3,
    blending_cost=100.0,
    fossilize_contribution=-100.0,
    fossilize_errors=1e9,
    harm=100.0,
    embargo_epochs=1,
    undo_wait=0,
)


class Recorder:
    """A sink that keeps the events, and counts how often it was closed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    def of(self, kind: EventType) -> list[Event]:
        return [event for event in self.events if event.type is kind]

    def stages(self) -> list[tuple[int, str, str]]:
        return [(e.epoch, e.data["slot"], e.data["stage"]) for e in self.of(EventType.SEED_STAGE)]


class StopAfter(Recorder):
    """Ends the run after an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def write(self, event: Event) -> None:
        if event.type is EventType.EPOCH and event.epoch == self.epoch + 1:
            raise KeyboardInterrupt


class Script(PlainState):
    """A controller that asks for given operations at given epochs, and keeps the signals it saw."""

    def __init__(self, **by_epoch: Decision) -> None:
        self.by_epoch = {int(key[1:]): decision for key, decision in by_epoch.items()}
        self.seen: list[Signals] = []

    def decide(self, signals: Signals) -> Decision:
        self.seen.append(signals)
        return self.by_epoch.get(signals.epoch, Decision(op=Op.WAIT))

    def reset(self) -> None: ...


def germinate(
    slot: str = "early", blueprint: str = "conv_light", blend: str = "linear"
) -> Decision:
    return Decision(op=Op.GERMINATE, slot=slot, blueprint=blueprint, blend=blend)


def a_life_and_a_cull() -> Script:
    """Seats a seed early, which lives on, and one in the middle, which it culls; asks for what must
    be refused."""
    return Script(
        e1=germinate("early"),
        e2=germinate("mid", "norm"),
        e3=Decision(op=Op.CULL, slot="mid", reason="script"),
        e4=Decision(op=Op.FOSSILIZE, slot="late", reason="to be refused"),
    )


def run_under(
    episode: Episode,
    policy: Policy,
    hub: TelemetryHub | None = None,
    *,
    mode: str = "heuristic",
    checkpoints: Checkpoints | None = None,
) -> EpisodeResult:
    """Run an episode under another controller."""
    episode.policy = policy
    episode.hub = hub or TelemetryHub()
    episode.mode = mode
    return run_episode(episode, checkpoints)


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Planted:
    """A loader that gives some batches changed, by (epoch, number of the batch), both from 1."""

    def __init__(
        self, loader: Iterable[tuple[Tensor, Tensor]], change: Change, *places: tuple[int, int]
    ) -> None:
        self.loader = loader
        self.change = change
        self.places = places
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        for number, (inputs, targets) in enumerate(self.loader, start=1):
            planted = (self.epoch, number) in self.places
            yield self.change(inputs, targets) if planted else (inputs, targets)


def not_a_number(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs * float("nan"), targets


def mislabelled(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first target is outside ten classes."""
    targets = targets.clone()
    targets[0] = 10
    return inputs, targets


def ignored(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first target is ignored."""
    targets = targets.clone()
    targets[0] = -100
    return inputs, targets


def strict(line: str) -> Any:
    """JSON as the standard has it: Python's reader would take NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


# data of events, as a run makes them
STARTED = {
    "mode": "heuristic",
    "task": "digits",
    "seed": 42,
    "max_epochs": 75,
    "device": "cpu",
    "backend": "eager",
    "slots": ["early"],
    "host_parameters": 1009,
}
STAGE = {
    "slot": "early",
    "seed_id": "seed_0",
    "from": "BLENDING",
    "stage": "PROBATIONARY",
    "reason": "G3 passed",
    "contribution": 3.456,
}
