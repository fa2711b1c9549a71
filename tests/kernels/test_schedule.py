"""The division of the work on a CPU changes no bit of a result."""

import itertools

import numpy as np
import pytest

KIB = 1 << 10


@pytest.mark.parametrize(
    ("classes", "cache", "kept"),
    [
        pytest.param(10, 256 * KIB, 32_768, id="few"),
        pytest.param(32_768, 256 * KIB, 32_768, id="fill half the cache"),
        pytest.param(32_769, 256 * KIB, 32_768, id="one class too many"),
        pytest.param(131_072, 1024 * KIB, 131_072, id="a large cache"),
        pytest.param(131_073, 1024 * KIB, 65_536, id="one class too many for a large cache"),
        pytest.param(1_048_576, 8192 * KIB, 1_048_576, id="fill half of 8 MiB"),
        pytest.param(1_048_577, 8192 * KIB, 65_536, id="one class too many for 8 MiB"),
        pytest.param(10, 300 * KIB, 36_864, id="whole chunks"),
        pytest.param(50_257, 16 * KIB, 0, id="less than a chunk"),
        pytest.param(50_257, 0, 0, id="no cache"),
    ],
)
def test_how_much_of_a_row_is_kept(classes: int, cache: int, kept: int) -> None:
    """The row is kept if its floats fit half the cache; of a longer row, at most 256 KiB are."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    assert cpp.kept_classes(classes, cache) == kept


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 70_001), id="stored"),
        pytest.param((1, 1_050_001), id="longer than half of 8 MiB"),
        pytest.param((61, 70_001), id="streamed", marks=pytest.mark.slow),
    ],
)
def test_threads_and_caches_change_no_bit(shape: tuple[int, int]) -> None:
    """Of a row's 70,001 exponentials, 32,768 are kept with a cache of 256 KiB, 65,536 with 544 KiB,
    and all with 8 MiB; of 1,050,001, again 65,536 are kept with 8 MiB."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, shape).astype(np.float32)
    logits[0, :40_000] -= 100  # whole chunks that are negligible
    targets = random.integers(0, shape[1], shape[0])
    for level in cpp.instruction_sets():
        results = [
            cpp.cross_entropy(logits, targets, level, cache * KIB, threads)
            for cache, threads in itertools.product((0, 256, 544, 8192), (1, 2, 5))
        ]
        for grad, loss in results[1:]:
            assert np.array_equal(grad.view(np.uint32), results[0][0].view(np.uint32)), level
            assert loss == results[0][1]


def test_many_small_pieces_change_no_bit() -> None:
    """More rows than there are pieces of work, and more threads than this machine may have."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (40_001, 33)).astype(np.float32)
    targets = random.integers(0, 33, len(logits))
    for level in cpp.instruction_sets():
        results = [cpp.cross_entropy(logits, targets, level, 1 << 20, t) for t in (1, 2, 5)]
        for grad, loss in results[1:]:
            assert np.array_equal(grad.view(np.uint32), results[0][0].view(np.uint32)), level
            assert loss == results[0][1]
