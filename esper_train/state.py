"""What can be saved and given back: the interface, objects whose state is a few attributes, and random numbers.

`checkpoint` gathers the state of everything a run changes; nothing here knows of files.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch

try:
    import numpy
except ImportError:  # torch works without it, and then nobody draws from it
    numpy = None  # type: ignore[assignment]


class Stateful(Protocol):
    """Gives its state as dicts, lists, tuples, strings, numbers, None and tensors, and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


class PlainState:
    """An object whose whole state is the attributes that `STATE` names, with plain values."""

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the attributes by name."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` gave; `ValueError` for other names."""
        if set(state_dict) != set(self.STATE):
            raise ValueError(f"expected the state of {type(self).__name__}, {list(self.STATE)}, got {list(state_dict)}")
        for name, value in state_dict.items():
            setattr(self, name, copy.deepcopy(value))


class RandomState:
    """A run's random numbers: the generators it owns and, while `active`, those of python, numpy, torch and the device.

    Outside of `active` the global generators are the caller's.
    """

    def __init__(self, seed: int, device: torch.device, **own: torch.Generator) -> None:
        self._device = device
        self._own = own
        self._seed = seed
        self._kept: dict[str, Any] | None = None  # of the global generators, while they are the caller's

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from the run's own stream inside: seeded the first time, continued from then on."""
        callers = self._globals()
        try:
            random.seed(self._seed)
            torch.manual_seed(self._seed)
            if numpy is not None:
                numpy.random.seed(self._seed % 2**32)
            if self._kept is not None:
                self._set_globals(self._kept)
                self._kept = None
            yield
        finally:
            self._kept = self._globals()
            self._set_globals(callers)

    def state_dict(self) -> dict[str, Any]:
        """Where every generator stands."""
        return {name: g.get_state() for name, g in self._own.items()} | {"global": self._kept or self._globals()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on from `state_dict` when next `active`. A device of another kind starts from the seed."""
        for name, generator in self._own.items():
            generator.set_state(state_dict[name])
        self._kept = state_dict["global"]

    def _globals(self) -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if numpy is not None:
            legacy: Any = numpy.random.get_state()
            kind, keys, *rest = legacy
            state["numpy"] = (kind, tuple(keys.tolist()), *rest)
        if self._device.type != "cpu":
            state[self._device.type] = torch.get_device_module(self._device).get_rng_state(self._device)
        return state

    def _set_globals(self, state: Mapping[str, Any]) -> None:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if numpy is not None and "numpy" in state:
            numpy.random.set_state(state["numpy"])
        if self._device.type != "cpu" and self._device.type in state:
            torch.get_device_module(self._device).set_rng_state(state[self._device.type], self._device)
