"""How the work on a CPU is divided changes no bit of a result."""

import itertools

import numpy as np
import pytest

KIB = 1 << 10


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 70_001), id="stored"),
        pytest.param((61, 70_001), id="streamed", marks=pytest.mark.slow),
    ],
)
def test_threads_and_caches_change_no_bit(shape: tuple[int, int]) -> None:
    """The exponentials of a row are kept in part with a cache of 256 KiB, and all with 8 MiB."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, shape).astype(np.float32)
    logits[0, :40_000] -= 100  # whole chunks that are negligible
    targets = random.integers(0, shape[1], shape[0])
    for level in cpp.instruction_sets():
        results = [
            cpp.cross_entropy(logits, targets, level, cache * KIB, threads)
            for cache, threads in itertools.product((0, 256, 8192), (1, 2, 5))
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
