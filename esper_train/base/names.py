"""Checks of names and types, with one wording for the whole package."""

import difflib
from collections.abc import Iterable


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless the name is a known one."""
    names = list(known)
    if name not in names:
        raise unknown_name(kind, name, names)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name, which gives the nearest known name and lists them all."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f"; perhaps {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")


def require_type(value: object, kind: type, name: str, hint: str = "") -> None:
    """Raise `TypeError` unless the argument of that name is of that type. `hint` says what to pass
    instead."""
    if not isinstance(value, kind):
        got = " ".join(repr(value).split())
        way_out = f"; {hint}" if hint else ""
        raise TypeError(f"{name} must be of type {kind.__name__}, got {got:.80}{way_out}")
