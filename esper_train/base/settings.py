"""Settings as frozen dataclasses, with limits that are checked, and their conversion from plain
values."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from esper_train.base.names import require_known, require_type

T = TypeVar("T")


class Limit(NamedTuple):
    """A condition on the value of a setting, in words and as a function."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("at least 1", lambda value: value >= 1)]
CountOrNone = Annotated[
    int | None, Limit("at least 1 or left out", lambda value: value is None or value >= 1)
]
CountOrZero = Annotated[int, Limit("at least 0", lambda value: value >= 0)]
CountOrZeroOrNone = Annotated[
    int | None, Limit("at least 0 or left out", lambda value: value is None or value >= 0)
]
Positive = Annotated[float, Limit("positive and finite", lambda value: 0 < value < math.inf)]
PositiveOrNone = Annotated[
    float | None,
    Limit("positive and finite, or left out", lambda value: value is None or 0 < value < math.inf),
]
PositiveOrZero = Annotated[
    float, Limit("at least 0 and finite", lambda value: 0 <= value < math.inf)
]
Share = Annotated[float, Limit("in [0, 1]", lambda value: 0 <= value <= 1)]
Factor = Annotated[float, Limit("in (0, 1]", lambda value: 0 < value <= 1)]
Decay = Annotated[float, Limit("in [0, 1)", lambda value: 0 <= value < 1)]


class Settings:
    """Base of the config classes. Raises `TypeError` for a value of another type than its field's,
    and `ValueError` for one outside its choices or `Limit`, or that is not finite.

    `table` is the name of the table that has the fields in a TOML file.
    """

    _table: ClassVar[str]

    def __init_subclass__(cls, table: str = "") -> None:
        cls._table = table

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if typing.get_origin(hint) is ClassVar:
                continue
            value = getattr(self, name)
            _check(f"{self._table}{name}", value, hint)
            if typing.get_origin(hint) is Literal:
                # a member of a StrEnum equals its string, but files hold strings
                choices = typing.get_args(hint)
                object.__setattr__(self, name, choices[choices.index(value)])


def _check(where: str, value: Any, hint: Any) -> None:
    """Raise an error that names the setting `where` if it cannot have this value."""
    if typing.get_origin(hint) is Literal:
        choices = ", ".join(c or "left out" for c in typing.get_args(hint))
        known = isinstance(value, (str, NoneType)) and value in typing.get_args(hint)
        require(known, f"{where} must be one of {choices}", value)
        return
    limits = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Limit)]
    hint = _plain(hint)
    if not _fits(value, hint):
        raise TypeError(f"{where} takes {_named(hint)}, got {value!r}")
    for limit in limits:
        require(limit.holds(value), f"{where} must be {limit.words}", value)
    if isinstance(value, float):
        require(math.isfinite(value), f"{where} must be a finite number", value)
    if isinstance(value, int):  # what is made of it holds 64 bits
        fits = -(2**63) <= value < 2**63
        require(fits, f"{where} must be at least -2**63 and below 2**63", value)
    if typing.get_origin(hint) is tuple:
        for i, part in enumerate(value):
            _check(f"{where}[{i}]", part, typing.get_args(hint)[0])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; an int serves as a float, a bool as neither."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = _plain(typing.get_args(hint)[0])
        return isinstance(value, tuple) and all(_fits(part, item) for part in value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Callable or hint is Callable:
        return callable(value)
    if hint is float:
        return type(value) in (float, int)
    if hint is int:
        return type(value) is int
    return isinstance(value, hint)


def _plain(hint: Any) -> Any:
    """The type without its limits."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _named(hint: Any) -> str:
    """The annotated type in words."""
    hint = _plain(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return f"a tuple of {_named(typing.get_args(hint)[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return "a callable" if origin is Callable else hint.__name__


def require(holds: bool, what: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{what}, got {value!r}")


def from_dict(
    cls: type[T], values: Mapping[str, Any], *, base: T | None = None, where: str = ""
) -> T:
    """Build `cls`, a config dataclass, from plain values, such as those of TOML and JSON.

    Keys that are left out keep the value of `base`, or their default. Raises `ValueError` for an
    unknown key (with the nearest known one) and `TypeError` for a value of the wrong type. `where`
    is the path of `values`, for the messages.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"cls must be a config dataclass, such as RunConfig, got {cls!r:.80}")
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a mapping from setting to value, got {values!r:.80}")
    if base is not None:
        require_type(base, cls, "base")
    hints = typing.get_type_hints(cls)
    names = [where + f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        require_known("config key", where + key, names)
        arguments[key] = _convert(hints[key], value, where + key, getattr(base, key, None))
    return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)  # type: ignore[type-var]


def _convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"config key {path!r} is a table of settings, got {value!r}")
        return from_dict(hint, value, base=base, where=path + ".")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"config key {path!r} takes a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, path) for item in value)
    if typing.get_origin(hint) is Literal:
        return value  # the dataclass checks the choices itself
    accepted = typing.get_args(hint) or (hint,)
    if float in accepted and type(value) is int and -(2**63) <= value < 2**63:
        return float(value)
    if type(value) not in accepted:
        expected = " or ".join(t.__name__ for t in accepted)
        raise TypeError(f"config key {path!r} takes {expected}, got {value!r}")
    return value


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The settings in which several configs, given as nested plain values, differ.

    Returns the path of each such setting, as "optim.host_lr", with its value in each config: None
    where a config does not have it.
    """
    flat = [_flattened(each) for each in settings]
    paths = dict.fromkeys(path for each in flat for path in each)
    values = {path: tuple(each.get(path) for each in flat) for path in paths}
    return {path: found for path, found in values.items() if any(v != found[0] for v in found)}


def _flattened(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{where}{key}.")
        else:  # JSON has lists where a config has tuples
            flat[where + key] = tuple(value) if isinstance(value, list) else value
    return flat
