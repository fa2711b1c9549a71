"""State that can be saved and given back: the interface, objects of a few plain attributes, random numbers."""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch


class Stateful(Protocol):
    """Gives its state as dicts, lists, tuples, strings, numbers, None and tensors, and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


class PlainState:
    """An object whose whole state is the attributes that `STATE` names, with plain values."""

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        for name in self.STATE:
            setattr(self, name, copy.deepcopy(state_dict[name]))


class RandomState:
    """A run's random numbers: generators of its own and, while `active`, those of python, numpy, torch and the device.

    Outside of `active` the global generators are the caller's. On a device of another kind it starts from the seed.
    """

    def __init__(self, seed: int, device: torch.device, **own: torch.Generator) -> None:
        self._seed = seed
        self._own = own
        self._restored: Mapping[str, Any] = {}
        self._global: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "python": (random.getstate, random.setstate),
            "torch": (torch.get_rng_state, torch.set_rng_state),
        }
        self._numpy: Any = sys.modules.get("numpy")  # torch imports it where there is one
        if self._numpy is not None:
            self._global["numpy"] = (self._numpy_state, self._numpy.random.set_state)
        if device.type != "cpu":
            module = torch.get_device_module(device)
            set_state = partial(module.set_rng_state, device=device)
            self._global[device.type] = (partial(module.get_rng_state, device), set_state)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from the run's stream inside, from its beginning or from where `load_state_dict` put it."""
        callers = {name: get() for name, (get, _) in self._global.items()}
        try:
            random.seed(self._seed)
            torch.manual_seed(self._seed)
            if self._numpy is not None:
                self._numpy.random.seed(self._seed % 2**32)
            self._set(self._restored)
            yield
        finally:
            self._set(callers)

    def state_dict(self) -> dict[str, Any]:
        """Where every generator stands; called while `active`."""
        return {g: own.get_state() for g, own in self._own.items()} | {g: get() for g, (get, _) in self._global.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        for name, generator in self._own.items():
            generator.set_state(state_dict[name])
        self._restored = state_dict

    def _set(self, states: Mapping[str, Any]) -> None:
        for name, (_, set_state) in self._global.items():
            if name in states:
                set_state(states[name])

    def _numpy_state(self) -> tuple[Any, ...]:
        kind, keys, *rest = self._numpy.random.get_state()
        return kind, tuple(keys.tolist()), *rest
