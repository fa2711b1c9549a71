"""The order in which tests start, and which process starts them."""

from itertools import islice
from typing import NamedTuple

import pytest


class Timed(NamedTuple):
    """A test, as far as the order is concerned."""

    place: int  # in the list of all
    module: str
    seconds: float  # that it may take


def longest_first(items: list[pytest.Item], usual_timeout: float, processes: int) -> None:
    """Put `items` into the order of `in_parts`, in place, by their marks `timeout`."""
    tests = []
    for place, item in enumerate(items):
        mark = item.get_closest_marker("timeout")
        seconds = usual_timeout if mark is None else max(usual_timeout, mark.args[0])
        tests.append(Timed(place, item.nodeid.partition("::")[0], seconds))
    items[:] = [items[test.place] for test in in_parts(tests, usual_timeout, processes)]


def in_parts(tests: list[Timed], usual_timeout: float, processes: int) -> list[Timed]:
    """The tests in a part for each process, of equal lengths. Each part begins with those that may
    take longer than usual, in whole modules, and ends with others in the order given.

    pytest-xdist cuts the list into such parts. Each process takes tests from the front of its part;
    one that has none left takes some from the end of another's. So no process begins a long test
    when the others are about to end, and what a fixture of such a module makes is made once.
    """
    long: dict[str, list[Timed]] = {}
    for test in tests:
        if test.seconds > usual_timeout:
            long.setdefault(test.module, []).append(test)
    parts: list[list[Timed]] = [[] for _ in range(processes)]
    dealt = [0.0] * processes
    for module in sorted(long.values(), key=_longest, reverse=True):  # stable, in reverse too
        least = dealt.index(min(dealt))
        dealt[least] += _longest(module)
        parts[least] += sorted(module, key=lambda test: test.seconds, reverse=True)
    others = (test for test in tests if test.seconds <= usual_timeout)
    left = len(tests)
    for number, part in enumerate(parts):
        part += islice(others, max(0, left // (processes - number) - len(part)))
        left -= len(part)
    return [*(test for part in parts for test in part), *others]


def _longest(module: list[Timed]) -> float:
    return max(test.seconds for test in module)
