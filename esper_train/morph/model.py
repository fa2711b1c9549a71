"""A host with slots: an ordinary module that can grow. `train` calls it, `run` grows it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.base.names import require_known, require_names, require_type
from esper_train.base.state import RandomStreams
from esper_train.morph.blueprints import BlueprintRegistry, default_registry
from esper_train.morph.config import GrowthConfig
from esper_train.morph.host import Host
from esper_train.morph.incubation import Incubation, Statistics
from esper_train.morph.lifecycle import RefusedError, SeedStage, SlotState, StageChange
from esper_train.morph.slot import SeedSlot


class MorphModel(nn.Module):
    """A host with seed slots after some of its segments; with no slots, just the host.

    `slots` names the open ones; unknown or repeated ones are a `ValueError`. Seeds are made from
    `registry`; None takes the package's own. `seed` starts the random numbers from which seeds are
    initialised and drop out.
    """

    def __init__(
        self,
        host: Host,
        slots: Sequence[str] = (),
        *,
        growth: GrowthConfig | None = None,
        seed: int = 0,
        registry: BlueprintRegistry | None = None,
    ) -> None:
        super().__init__()
        require_type(host, Host, "host", "make a Host of the network's segments and its head")
        require_names(slots, "slots")
        require_type(growth, GrowthConfig, "growth", or_none=True)
        require_type(registry, BlueprintRegistry, "registry", or_none=True)
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots are named more than once: {', '.join(slots)}")
        for slot in slots:
            require_known("slot of this host", slot, host.segments)
        first = next(host.parameters(), None)
        if first is None:
            raise ValueError(
                "expected a host with parameters, got one without, which has nothing to train; "
                "give a segment or the head a layer that learns"
            )
        self.host = host
        self.registry = registry or default_registry()
        channels = {slot: host.slot_channels[slot] for slot in host.segments if slot in slots}
        growth = growth or GrowthConfig()
        self.seed_slots = nn.ModuleDict({s: SeedSlot(s, channels[s], growth) for s in channels})
        self.streams = RandomStreams(seed)
        """Random numbers of each slot: nothing that a seed draws in TRAINING shows in the run's
        own."""
        for name, seated in self.seed_slots.items():  # the device and dtype of what a seed follows
            seated.to(next(host.segments[name].parameters(), first))

    def forward(
        self,
        *inputs: Any,
        alpha: Mapping[str, float] | None = None,
        start: str | None = None,
        **named: Any,
    ) -> Any:
        """The output of the head for the inputs of the first segment. `alpha` overrides the alpha
        of some slots for this call only; 0 leaves the seed out.

        `start` names a slot to begin at: the input is then what entered it, as `forward_keeping`
        gave it.
        """
        override = alpha or {}
        for name in (*override, *([] if start is None else [start])):
            # refuses a misspelt name, which would silently measure the whole network
            self.slot(name)
        return self.host.head(self._run(inputs, named, override, start, None))

    def features(self, *inputs: Any, **named: Any) -> Tensor:
        """The hidden states from which `output_layer` computes the logits, for a loss that does
        without logits."""
        return self.host.before_output(self._run(inputs, named, {}, None, None))

    @property
    def output_layer(self) -> nn.Linear | None:
        """The last layer, where that is linear; None where `features` has no use."""
        return self.host.output_layer

    def forward_keeping(self, *inputs: Any, **named: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output of the head, and what entered each slot, in order of execution, from which
        `forward` can start.

        Nothing is kept where a segment changes its input in place. Not for inference mode, which
        would hide that.
        """
        entered: dict[str, tuple[Tensor, int]] = {}
        output = self.host.head(self._run(inputs, named, {}, None, entered))
        intact = torch.compiler.is_compiling() or all(
            kept._version == v for kept, v in entered.values()
        )
        return output, {name: kept for name, (kept, _) in entered.items()} if intact else {}

    def forward_feeding(self, *inputs: Any, **named: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output of the head, and for each seed that learns beside the network a copy of what
        entered its slot."""
        entered: dict[str, tuple[Tensor, int]] = {}
        output = self.host.head(self._run(inputs, named, {}, None, entered, copied=self.learning))
        return output, {name: kept for name, (kept, _) in entered.items()}

    def _run(
        self,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        alpha: Mapping[str, float],
        start: str | None,
        entered: dict[str, tuple[Tensor, int]] | None,
        copied: Sequence[str] | None = None,
    ) -> Tensor:
        """The segments, from slot `start` on. What enters each slot goes into `entered`, with its
        version; of the slots in `copied` alone a copy, where that is given."""
        copies = (
            copied is not None or torch.compiler.is_compiling()
        )  # versions do not exist under a compiler
        for name, segment in self.host.segments.items():
            if start is None:
                x = segment(*inputs, **named)
            elif name == start:
                (x,) = inputs
            else:
                continue
            start = None
            if name in self.seed_slots:
                if entered is not None and (copied is None or name in copied):
                    entered[name] = (x.detach().clone(), 0) if copies else (x, x._version)
                x = self.seed_slots[name](x, alpha.get(name))
            inputs, named = (x,), {}
        (x,) = inputs
        return x

    @property
    def learning(self) -> tuple[str, ...]:
        """Slots whose seeds learn beside the network, by passes of their own."""
        # not through `state`: reading that record would recompile the program every epoch
        slots = self.seed_slots.items()
        return tuple(name for name, slot in slots if slot.statistics is not None)

    def incubation(self, name: str) -> Incubation:
        """The context in which a slot in `learning` makes its pass."""
        statistics = self.slot(name).statistics
        if statistics is None:
            raise ValueError(f"slot {name!r} has no seed that learns beside the network")
        seeds = [self.seed_slots[later] for later in self._after(name) if later in self.seed_slots]
        behind = [*self._host_after(name), *(module for slot in seeds for module in slot.modules())]
        return Incubation(behind, statistics)

    def _prepare(self, name: str) -> None:
        """Statistics for a seed that learns beside the network, from the network's own."""
        slot = self.slot(name)
        learns = slot.state.stage is SeedStage.TRAINING and slot.growth.incubation == "closed"
        slot.statistics = Statistics(self._host_after(name)) if learns else None

    def _after(self, name: str) -> list[str]:
        """The segments that run after a slot."""
        names = list(self.host.segments)
        return names[names.index(name) + 1 :]

    def _host_after(self, name: str) -> list[nn.Module]:
        """The host's modules that run after a slot."""
        parts = [*(self.host.segments[later] for later in self._after(name)), self.host.head]
        return [module for part in parts for module in part.modules()]

    @property
    def structure(self) -> tuple[tuple[str | None, str], ...]:
        """The seed and the part of each slot: `forward` runs the same operations as long as these
        are the same."""
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
        """The state of every slot as plain values, from which `rebuild` restores them."""
        return [slot.state.to_plain() for slot in self.slots]

    def rebuild(self, topology: Iterable[Mapping[str, Any]]) -> None:
        """Restore the seeds of a saved `topology`; `load_state_dict` then restores the weights."""
        states = [SlotState.from_plain(values) for values in topology]
        if {state.slot for state in states} != set(self.seed_slots):
            raise ValueError(
                f"expected slots {list(self.seed_slots)}, got {[state.slot for state in states]}"
            )
        with torch.random.fork_rng(devices=[]):  # the initial weights do not stay
            for state in states:
                name = state.blueprint
                blueprint = self.registry.require(self.host.topology, name) if name else None
                self.slot(state.slot).restore(state, blueprint)
        for name in self.seed_slots:
            self._prepare(name)

    def germinate_seed(
        self, blueprint: str, seed_id: str, *, slot: str, blend: str = "sigmoid"
    ) -> list[StageChange]:
        """Seat a new seed. `ValueError` for an unknown slot, blueprint or blend, `RefusedError` for
        a slot that is not open or one seed too many, `RuntimeError` if a seed of this id is already
        seated."""
        target = self.slot(slot)
        recipe = self.registry.require(self.host.topology, blueprint)
        seated = sum(other.seed is not None for other in self.slots)
        if target.growth.max_seeds is not None and seated >= target.growth.max_seeds:
            raise RefusedError(
                f"{seated} seeds are seated and growth.max_seeds is {target.growth.max_seeds}"
            )
        if any(seed_id == other.state.seed_id for other in self.slots):
            raise RuntimeError(f"a seed with the id {seed_id!r} is already seated; ids must differ")
        with self.streams.active(slot, target.alpha.device):
            changes = target.germinate(recipe, seed_id, blend)
        self._prepare(slot)
        return changes

    def fossilize_seed(self, *, slot: str) -> list[StageChange]:
        """Make a slot's seed permanent; `RefusedError` with the reasons where it may not be."""
        return self.slot(slot).fossilize()

    def cull_seed(self, *, slot: str, reason: str = "requested") -> list[StageChange]:
        """Remove a slot's live seed; `RefusedError` if it has none."""
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

    @torch.no_grad()
    def shrink_host(self, factor: float) -> None:
        """Multiply the host's trainable matrices, of any number of dimensions above one, by
        `factor`."""
        for parameter in self.host.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(factor)

    @property
    def fossils(self) -> int:
        """Number of fossilized seeds."""
        return sum(slot.state.stage is SeedStage.FOSSILIZED for slot in self.slots)
