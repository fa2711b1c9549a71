"""A host with slots: an ordinary module that can grow. `loop` calls it, `episode` grows it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.base.names import require_known
from esper_train.morph.blueprints import BlueprintRegistry, default_registry
from esper_train.morph.config import GrowthConfig
from esper_train.morph.host import Host
from esper_train.morph.lifecycle import SeedStage, SlotState, StageChange
from esper_train.morph.slot import SeedSlot


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
        for slot in slots:
            require_known("slot (of those this host's depth allows)", slot, host.segments)
        self.host = host
        self.registry = registry or default_registry()
        channels = {slot: host.slot_channels[slot] for slot in host.segments if slot in slots}
        growth = growth or GrowthConfig()
        self.seed_slots = nn.ModuleDict({s: SeedSlot(s, channels[s], growth, max_epochs) for s in channels})
        self.seed_slots.to(next(host.parameters()))  # its device and dtype

    def forward(self, x: Tensor, alpha: Mapping[str, float] | None = None, start: str | None = None) -> Tensor:
        """Logits. `alpha` overrides the alpha of some slots for this call only; 0 leaves the seed out.

        `start` names a slot to begin at: x is then what entered it, as `forward_keeping` gave it.
        """
        override = alpha or {}
        for name in (*override, *([] if start is None else [start])):
            self.slot(name)  # refuses a misspelt one, which would measure the whole network unnoticed
        return self._run(x, override, start, None)

    def forward_keeping(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what entered each slot, in order of execution, for `forward` to start from.

        Nothing is kept where a segment changes its input in place. Not for inference mode, which would hide that.
        """
        entered: dict[str, tuple[Tensor, int]] = {}
        logits = self._run(x, {}, None, entered)
        intact = torch.compiler.is_compiling() or all(kept._version == v for kept, v in entered.values())
        return logits, {name: kept for name, (kept, _) in entered.items()} if intact else {}

    def _run(
        self, x: Tensor, alpha: Mapping[str, float], start: str | None, entered: dict[str, tuple[Tensor, int]] | None
    ) -> Tensor:
        for name, segment in self.host.segments.items():
            if start is None:
                x = segment(x)
            elif name != start:
                continue
            start = None
            if name in self.seed_slots:
                if entered is not None:  # compilers know no versions
                    entered[name] = (x.clone(), 0) if torch.compiler.is_compiling() else (x, x._version)
                x = self.seed_slots[name](x, alpha.get(name))
        return self.host.head(x)

    @property
    def structure(self) -> tuple[tuple[str | None, str], ...]:
        """Seed and part of each slot: as long as it is the same, so is the program that `forward` is."""
        return tuple((slot.state.seed_id, slot.part) for slot in self.slots)

    def slot(self, name: str) -> SeedSlot:
        """The slot of this name; `ValueError` names those that exist."""
        require_known("slot", name, self.seed_slots)
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
