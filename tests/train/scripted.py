"""For tests of whole runs: a scripted controller, a sink that keeps what it is given, growth without hurdles."""

from esper_train import Decision, Event, EventType, GrowthConfig, Op, Signals
from esper_train.state import PlainState

# a seed's whole life in few epochs: every threshold that asks for a gain is taken away
EASY = GrowthConfig(
    blending_improvement=-100.0,
    blending_gradient_ratio=0.0,
    fossilize_contribution=-100.0,
    blending_epochs=3,
    training_dwell_fraction=0.0,
    embargo_epochs=1,
)


class Recorder:
    """A sink that keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def of(self, kind: EventType) -> list[Event]:
        return [event for event in self.events if event.type is kind]

    def stages(self) -> list[tuple[int, str, str]]:
        return [(e.epoch, e.data["slot"], e.data["stage"]) for e in self.of(EventType.SEED_STAGE)]


class Script(PlainState):
    """A controller that asks for given operations at given epochs, and keeps the signals it saw."""

    def __init__(self, **by_epoch: Decision) -> None:
        self.by_epoch = {int(key[1:]): decision for key, decision in by_epoch.items()}
        self.seen: list[Signals] = []

    def decide(self, signals: Signals) -> Decision:
        self.seen.append(signals)
        return self.by_epoch.get(signals.epoch, Decision(op=Op.WAIT))

    def reset(self) -> None: ...


def germinate(slot: str = "early", blueprint: str = "conv_light", blend: str = "linear") -> Decision:
    return Decision(op=Op.GERMINATE, slot=slot, blueprint=blueprint, blend=blend)
