"""A few variants in place of all of them."""

from collections.abc import Sequence
from itertools import combinations


def properties(name: str) -> frozenset[str]:
    """The words between the commas of a variant's name, and whether it has measures."""
    words = set(name.split(", "))
    return frozenset(words if "measured" in words else words | {"not measured"})


def triples(names: Sequence[str]) -> set[tuple[str, ...]]:
    """Every three properties that one of the variants has, or all of one that has fewer."""
    each = [sorted(properties(name)) for name in names]
    return {three for words in each for three in combinations(words, min(3, len(words)))}


def covering(names: Sequence[str]) -> list[str]:
    """Some of the variants, such that any three properties that a variant has are together in one
    of these as well. Each next one is that with the most that are still missing."""
    having = {name: triples([name]) for name in names}
    missing = triples(names)
    chosen = []
    while missing:
        best = max(names, key=lambda name: len(having[name] & missing))
        chosen.append(best)
        missing -= having[best]
    return chosen
