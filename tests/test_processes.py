"""The distribution of tests: to processes, which share what is made once and start long tests
first, and to backends, which take cases in turn."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.helpers.built_once import built_once
from tests.helpers.order import Timed, in_parts, longest_first
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


def ordered(names: str, processes: int) -> str:
    """Names of tests in the order in which they start. Their capital letter is the module; the
    number is the timeout in hundreds of seconds, where it is not the usual one."""
    each = names.split()
    tests = [Timed(i, name[0], 100.0 * int(name[2:] or 3)) for i, name in enumerate(each)]
    found = in_parts(tests, 300.0, processes)
    return " ".join(each[test.place] for test in found)


def test_long_tests_start_first_and_others_stay_in_their_order() -> None:
    assert ordered("Aa Ab6 Ac1 Bd6 Be9 Bf Cg9", 1) == "Be9 Bd6 Cg9 Ab6 Aa Ac1 Bf"
    assert ordered("", 2) == ""


@pytest.mark.parametrize(
    ("processes", "names", "expected"),
    [
        (2, "Aa Ab Ac Bd9 Be9 Cf6 Dg6 Ah Ai Aj", "Bd9 Be9 Aa Ab Ac Cf6 Dg6 Ah Ai Aj"),
        (3, "Aa6 Ab Ba6 Bb Ca9 Cb", "Ca9 Ab Aa6 Bb Ba6 Cb"),
        (3, "Aa Bb9", "Bb9 Aa"),
        (2, "Ba9 Bb9 Bc9 Cd9", "Ba9 Bb9 Bc9 Cd9"),
    ],
    ids=["halves", "thirds", "more processes than tests", "a module longer than its part"],
)
def test_each_process_starts_with_whole_modules_of_long_tests(
    processes: int, names: str, expected: str
) -> None:
    assert ordered(names, processes) == expected


def test_marks_and_files_make_the_order(pytester: pytest.Pytester) -> None:
    """Of the tests that are left after a choice by marks, in which xdist cuts the list."""
    items = pytester.getitems(
        """
        import pytest

        def test_a(): ...

        @pytest.mark.timeout(301)
        def test_b(): ...

        @pytest.mark.timeout(20)
        def test_c(): ...
        """
    )
    longest_first(items, 300.0, 1)
    assert [item.name for item in items] == ["test_b", "test_a", "test_c"]


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
