"""State that can be saved and restored: the interface, objects with a few plain attributes, and
random numbers."""

import copy
import random
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")
PLAIN = frozenset({bool, int, float, str, type(None)})


class Stateful(Protocol):
    """Gives its state as dicts, lists, tuples, strings, numbers, None and tensors, and takes it
    back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


def copied(value: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a state which further training leaves alone, on `device` or where it is;
    `TypeError` for a state beyond tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # with the attributes that a module's state has
        result.update((key, copied(item, device)) for key, item in value.items())
        return result
    if type(value) in (list, tuple):
        return type(value)(
            value if set(map(type, value)) <= PLAIN else (copied(item, device) for item in value)
        )
    if type(value) not in PLAIN:
        raise TypeError(f"a state holds tensors and plain values only, got {value!r}")
    return value


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a module's state, without what its `get_extra_state` adds."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class PlainState:
    """An object whose state is the plain values of the attributes that `STATE` names."""

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        for name in self.STATE:
            setattr(self, name, copy.deepcopy(state_dict[name]))


class RandomState:
    """A run's random numbers: the order of its data and, while `active`, python's, numpy's, torch's
    and the device's.

    Outside of `active` the global generators are the caller's. On a device of another kind they
    start from the seed.
    """

    def __init__(
        self, seed: int, device: torch.device, order: torch.Generator | None = None
    ) -> None:
        self._seed = seed
        self._device = device
        self._order = order or torch.Generator()
        self._restored: Mapping[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which random numbers come from the run's stream, which goes on where it was
        left, or where `load_state_dict` put it."""
        callers = _get(self._device)
        try:
            random.seed(self._seed)
            torch.manual_seed(self._seed)
            if numpy := _numpy():
                numpy.random.seed(self._seed % 2**32)
            if self._restored is not None:
                _set(self._restored, self._device)
            yield
        finally:
            self._restored = _get(self._device)
            _set(callers, self._device)

    def restart(self, seed: int) -> None:
        """Let all but the order of the data begin anew, from another seed."""
        self._seed = seed
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator; call it while `active`."""
        return _get(self._device) | {"order": self._order.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._order.set_state(state_dict["order"])
        self._restored = state_dict


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which the CPU generators of python, numpy and torch start from `seed`;
    afterwards they are restored. Generators of other devices are left alone."""
    callers = _get(CPU)
    try:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if numpy := _numpy():
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        _set(callers, CPU)


class RandomStreams:
    """Independent streams of torch's random numbers, by name: each goes on where it was last left.

    What draws inside `active` does not show in the random numbers outside.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: dict[str, dict[str, Tensor]] = {}  # name to type of device to generator state

    @contextmanager
    def active(self, name: str, device: torch.device) -> Iterator[None]:
        """A context in which random numbers on the CPU and on `device` come from the stream
        `name`."""
        callers = _torch_states(device)
        state = self._states.get(name)
        try:
            if state is None:
                torch.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            else:
                _set_torch_states(state, device)
            yield
            self._states[name] = _torch_states(device)
        finally:
            _set_torch_states(callers, device)

    def state_dict(self) -> dict[str, Any]:
        """The state of every stream."""
        return {name: dict(state) for name, state in self._states.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._states = {name: dict(state) for name, state in state_dict.items()}


@contextmanager
def no_random_numbers(device: torch.device, advice: str) -> Iterator[None]:
    """`ValueError` with the advice where torch's random numbers were drawn inside; not while a CUDA
    graph is being captured, when their state cannot be read."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield
        return
    before = _torch_states(device)
    yield
    after = _torch_states(device)
    if not all(torch.equal(before[kind], after[kind]) for kind in before):
        raise ValueError(f"expected no random numbers to be drawn; {advice}")


def _torch_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_torch_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def _numpy() -> Any:
    return sys.modules.get("numpy")  # torch has imported it where there is one


def _get(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := _numpy():
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = kind, tuple(keys.tolist()), *rest
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if (numpy := _numpy()) and "numpy" in state:
        numpy.random.set_state(state["numpy"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
