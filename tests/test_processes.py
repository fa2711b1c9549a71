"""Tests run in several processes: what these share is made once, and long tests start first."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.cuda_shim import build as shim
from tests.helpers.order import longest_first


def test_who_needs_the_simulator_at_the_same_time_waits_for_one_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = Barrier(3)
    built: list[Path] = []

    def build(library: Path) -> None:
        built.append(library)
        library.write_bytes(b"whole")

    def need() -> bytes:
        everybody.wait()
        return shim.built(tmp_path).read_bytes()

    monkeypatch.setattr(shim, "build", build)
    (tmp_path / "cuda_shim-of-older-sources.so").touch()
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(need) for _ in range(3)]
    assert [each.result() for each in found] == [b"whole"] * 3
    assert len(built) == 1
    assert [path.name for path in tmp_path.glob("*.so")] == [shim.built(tmp_path).name]


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
