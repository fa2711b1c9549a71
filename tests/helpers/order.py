"""The order in which tests start."""

import pytest


def longest_first(items: list[pytest.Item], usual_timeout: float) -> None:
    """Sort the tests that may take longer than `usual_timeout` seconds to the front, in place.

    Processes that share the tests take them from the front of their queue and give them away from
    its end. So none begins a long test when the others are about to end, and the tests of a module
    with a dear fixture stay in one process.
    """

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return usual_timeout if mark is None else max(usual_timeout, mark.args[0])

    items.sort(key=seconds, reverse=True)  # stable, with `reverse` too
