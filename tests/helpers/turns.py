"""Tests whose cases the backends take in turn."""

from pathlib import Path

import pytest


def deal_out(items: list[pytest.Item]) -> None:
    """Mark the cases of tests with `in_turn`: as slow on all backends but one, or as long if the
    case is slow in any event.

    Which one is the sum of the numbers of its values, so each backend meets each value of each
    parameter. Other instruction sets, and what needs a GPU, are left as they are.
    """
    dealt = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and item.get_closest_marker("in_turn")
        and not item.get_closest_marker("gpu")
        and not str(item.callspec.params["config"]).startswith("cpp-")
    ]
    values: dict[tuple[Path, str, str], list[object]] = {}
    """The values of a parameter of a test, in their order."""
    cases = []
    for item in dealt:
        case = {}
        for name, value in item.callspec.params.items():
            known = values.setdefault((item.path, item.originalname, name), [])
            place = [i for i, each in enumerate(known) if each is value]
            if not place:
                known.append(value)
            case[name] = place[0] if place else len(known) - 1
        cases.append(case)
    for item, case in zip(dealt, cases, strict=True):
        backends = values[item.path, item.originalname, "config"]
        backend = case.pop("config")
        case.pop("device", None)
        if sum(case.values()) % len(backends) != backend:
            slow = item.get_closest_marker("slow")
            item.add_marker(pytest.mark.long if slow else pytest.mark.slow)
