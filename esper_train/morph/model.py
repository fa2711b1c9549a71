"""A host with slots: an ordinary module that can grow. `loop` calls it, `episode` grows it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from esper_train.config import GrowthConfig
from esper_train.morph.blueprints import BlueprintRegistry, default_registry
from esper_train.morph.host import Host
from esper_train.morph.lifecycle import SeedStage, SlotState, StageChange
from esper_train.morph.slot import SeedSlot
from esper_train.names import unknown_name


class MorphModel(nn.Module):
    """A host with seed slots after some of its segments; with no slots, just the host.

    `slots` names the open ones; unknown or repeated ones are a `ValueError`. Some stage lengths follow from
    `max_epochs`, the length of the run. Seeds are made from `registry`; None takes the package's own.
    """

    def __init__(
        self,
        host: Host,
        slots: Sequence[str] = (),
        *,
        growth: GrowthConfig | None = None,
        max_epochs: int = 75,
        registry: BlueprintRegistry | None = None,
    ) -> None:
        super().__init__()
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots are named more than once: {', '.join(slots)}")
        unknown = [slot for slot in slots if slot not in host.segments]
        if unknown:
            raise unknown_name("slot (of those this host's depth allows)", unknown[0], host.segments)
        self.host = host
        self.registry = registry or default_registry()
        channels = {slot: host.slot_channels[slot] for slot in host.segments if slot in slots}
        growth = growth or GrowthConfig()
        self.seed_slots = nn.ModuleDict({s: SeedSlot(s, channels[s], growth, max_epochs) for s in channels})
        self.to(next(host.parameters()).device)

    def forward(self, x: Tensor, alpha: Mapping[str, float] | None = None) -> Tensor:
        """Logits. `alpha` overrides the alpha of some slots for this call only; 0 leaves the seed out."""
        override = alpha or {}
        for name in override:
            self.slot(name)  # refuses a misspelt one, which would measure the whole network unnoticed
        for name, segment in self.host.segments.items():
            x = segment(x)
            if name in self.seed_slots:
                x = self.seed_slots[name](x, override.get(name))
        return self.host.head(x)

    def slot(self, name: str) -> SeedSlot:
        """The slot of this name; `ValueError` names those that exist."""
        if name not in self.seed_slots:
            raise unknown_name("slot", name, self.seed_slots)
        slot = self.seed_slots[name]
        assert isinstance(slot, SeedSlot)
        return slot

    @property
    def slots(self) -> tuple[SeedSlot, ...]:
        """All slots, in the order of execution."""
        return tuple(self.slot(name) for name in self.seed_slots)

    def topology(self) -> list[dict[str, Any]]:
        """The state of every slot as plain values: what `rebuild` seats again."""
        return [slot.state.to_plain() for slot in self.slots]

    def rebuild(self, topology: Iterable[Mapping[str, Any]]) -> None:
        """Seat the seeds of a saved `topology`; their weights follow through `load_state_dict`."""
        states = [SlotState.from_plain(values) for values in topology]
        if {state.slot for state in states} != set(self.seed_slots):
            raise ValueError(f"expected slots {list(self.seed_slots)}, got {[state.slot for state in states]}")
        for state in states:
            blueprint = self.registry.require(self.host.topology, state.blueprint) if state.blueprint else None
            self.slot(state.slot).restore(state, blueprint)

    def germinate_seed(self, blueprint: str, seed_id: str, *, slot: str, blend: str = "sigmoid") -> list[StageChange]:
        """Seat a new seed. `ValueError` for an unknown slot, blueprint or blend or a slot that is not open;
        `RuntimeError` if a seed of this id is already seated."""
        target = self.slot(slot)
        seated = sum(other.seed is not None for other in self.slots)
        if target.growth.max_seeds is not None and seated >= target.growth.max_seeds:
            raise ValueError(f"{seated} seeds are seated and growth.max_seeds is {target.growth.max_seeds}")
        if any(seed_id == other.state.seed_id for other in self.slots):
            raise RuntimeError(f"a seed with the id {seed_id!r} is already seated; ids must differ")
        return target.germinate(self.registry.require(self.host.topology, blueprint), seed_id, blend)

    def fossilize_seed(self, *, slot: str) -> list[StageChange]:
        """Make a slot's seed permanent; `ValueError` with the reasons where it may not be."""
        return self.slot(slot).fossilize()

    def cull_seed(self, *, slot: str, reason: str = "requested") -> list[StageChange]:
        """Remove a slot's live seed; `ValueError` if it has none."""
        return self.slot(slot).cull(reason)

    def has_active_seed_in_slot(self, slot: str) -> bool:
        """Whether a seed is seated in the slot, fossilized ones included."""
        return self.slot(slot).seed is not None

    def get_seed_parameters(self, slot: str | None = None) -> Iterator[nn.Parameter]:
        """Parameters of the seed in one slot, or of all seeds."""
        for seated in self.slots if slot is None else (self.slot(slot),):
            if seated.seed is not None:
                yield from seated.seed.parameters()

    def get_host_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the host, none of a seed."""
        yield from self.host.parameters()

    @property
    def fossils(self) -> int:
        """Number of fossilized seeds."""
        return sum(slot.state.stage is SeedStage.FOSSILIZED for slot in self.slots)
