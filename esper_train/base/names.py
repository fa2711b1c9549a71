"""Checks of names and types, with one wording for the whole package."""

import difflib
from collections.abc import Collection, Iterable

NEAR = 0.6
"""How similar a known name has to be to be suggested: difflib's own default."""


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless the name is a known one."""
    names = list(known)
    if not isinstance(name, str) or name not in names:
        raise unknown_name(kind, name, names)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name, which suggests a known name that is near and lists them all.

    Of names with dots, such as "train.grad.every", the last parts are compared: the others agree.
    """
    names = list(known)
    parts = {each.rpartition(".")[2]: each for each in names}
    near = difflib.get_close_matches(str(name).rpartition(".")[2], parts, n=1, cutoff=NEAR)
    hint = f"; perhaps {parts[near[0]]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")


def require_type(
    value: object, kind: type, name: str, hint: str = "", *, or_none: bool = False
) -> None:
    """Raise `TypeError` unless the argument of that name is of that type. `hint` says what to pass
    instead; `or_none` permits None."""
    if isinstance(value, kind) or (or_none and value is None):
        return
    words = f"of type {kind.__name__}{' or None' if or_none else ''}"
    raise _unlike(value, name, words, hint)


def require_function(value: object, name: str, *, or_none: bool = False) -> None:
    """Raise `TypeError` unless the argument of that name can be called; `or_none` permits None."""
    if not callable(value) and not (or_none and value is None):
        raise _unlike(value, name, f"a function{' or None' if or_none else ''}")


def require_size(value: object, name: str) -> None:
    """Raise `TypeError` unless the argument of that name is an int, `ValueError` if it is below
    1."""
    if type(value) is not int:
        raise _unlike(value, name, "an int")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def require_names(value: object, name: str) -> None:
    """Raise `TypeError` for what is no collection of names, as a single name is none."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise _unlike(value, name, "a sequence of names", f"such as {name}=['early', 'mid']")


def _unlike(value: object, name: str, expected: str, hint: str = "") -> TypeError:
    got = " ".join(repr(value).split())
    way_out = f"; {hint}" if hint else ""
    return TypeError(f"{name} must be {expected}, got {got:.80}{way_out}")
