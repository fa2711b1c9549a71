"""The distribution of tests: to processes, which share what is made once and start long tests
first, and to backends, which take cases in turn."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.helpers.built_once import built_once
from tests.helpers.order import longest_first
from tests.helpers.turns import deal_out

pytest_plugins = "pytester"


def test_who_needs_a_build_at_the_same_time_waits_for_one(tmp_path: Path) -> None:
    everybody = Barrier(3)
    made: list[Path] = []

    def make(library: Path) -> None:
        made.append(library)
        library.write_bytes(b"whole")

    def need() -> bytes:
        everybody.wait()
        return built_once("ops", make, folder=tmp_path).read_bytes()

    (tmp_path / "ops-of-older-sources.so").touch()
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(need) for _ in range(3)]
    assert [each.result() for each in found] == [b"whole"] * 3
    assert len(made) == 1
    assert list(tmp_path.glob("*.so")) == [built_once("ops", make, folder=tmp_path)]
    other = built_once("ops", make, "-O2", folder=tmp_path)
    assert len(made) == 2
    assert list(tmp_path.glob("*.so")) == [other]


def test_long_tests_start_first_and_others_stay_in_their_order(
    request: pytest.FixtureRequest,
) -> None:
    names = {"a": None, "b": 900, "c": 60, "d": 1800, "e": 900, "f": None}
    items = []
    for name, seconds in names.items():
        item = pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None)
        if seconds is not None:
            item.add_marker(pytest.mark.timeout(seconds))
        items.append(item)
    longest_first(items, usual_timeout=300.0)
    assert [item.name for item in items] == ["d", "b", "e", "a", "c", "f"]


def test_backends_take_cases_in_turn(pytester: pytest.Pytester) -> None:
    """Each case has one backend, and each backend each value; what is slow becomes long."""
    items = pytester.getitems(
        """
        import pytest

        @pytest.mark.parametrize("config", ["eager", "cpp", "triton", "cpp-avx2"])
        @pytest.mark.parametrize("size", [1, 2, 3])
        @pytest.mark.parametrize("mode", ["a", "b", pytest.param("c", marks=pytest.mark.slow)])
        @pytest.mark.in_turn
        def test_it(config, size, mode): ...

        @pytest.mark.parametrize("config", ["eager", "cpp"])
        def test_other(config): ...
        """
    )
    deal_out(items)
    part = {
        item.name: next((m for m in ("long", "slow") if item.get_closest_marker(m)), "quick")
        for item in items
    }
    for mode, here, later in (
        ("a", "quick", "slow"),
        ("b", "quick", "slow"),
        ("c", "slow", "long"),
    ):
        for size in (1, 2, 3):
            found = {
                name: part[f"test_it[{mode}-{size}-{name}]"] for name in ("eager", "cpp", "triton")
            }
            assert sorted(found.values()) == sorted([here, later, later])
        for name in ("eager", "cpp", "triton"):
            assert [part[f"test_it[{mode}-{size}-{name}]"] for size in (1, 2, 3)].count(here) == 1
        assert part[f"test_it[{mode}-1-cpp-avx2]"] == ("slow" if mode == "c" else "quick")
    assert part["test_other[cpp]"] == "quick"
