"""The one way to refuse a name that nobody knows."""

import difflib
from collections.abc import Iterable


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `unknown_name` unless the name is among the known ones."""
    names = list(known)
    if name not in names:
        raise unknown_name(kind, name, names)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error to raise for an unknown name: it says the nearest known one and lists them all."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; perhaps {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")
