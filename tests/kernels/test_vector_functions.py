"""The vector functions of the CPU kernels over their stated domains, on every instruction set.

Truth is float64 (numpy), for conversions numpy's and torch's own rounding. The slow tests take a
sample of all float32 values, the long ones every value. Both print the worst error in units in the
last place (ulp).
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.builds import AVX512_SHIM, build_testing_module

Array = NDArray[np.generic]

SMALLEST_NORMAL = 2.0**-126
ZERO = 0
ONE_HALF = 0x3F000000
INFINITY = 0x7F800000
END = 1 << 32
MINUS_ZERO = 0x80000000
MINUS_INFINITY = 0xFF800000
MINUS_86 = 0xC2AC0000
NANS = range(INFINITY + 1, MINUS_ZERO), range(MINUS_INFINITY + 1, END)
CHUNK = 1 << 22
EVERY = pytest.mark.parametrize(
    "step",
    [
        pytest.param(4099, marks=pytest.mark.slow, id="sample"),  # a prime: all low bits occur
        pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(7200)], id="every value"),
    ],
)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The testing module. Without AVX-512 here, its source runs with the instructions in plain
    code."""
    module = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    if module.instruction_sets() != ["avx2", "baseline"]:
        return module
    return build_testing_module(tmp_path_factory.mktemp("shim") / "cpp.so", *AVX512_SHIM)


def floats(bits: range, step: int) -> Iterator[NDArray[np.float32]]:
    """Float32 numbers by their bits, in chunks: each `step`-th, and the first and last thousand."""
    edge = min(1000, len(bits))
    for part in (bits[:edge], bits[edge:-edge:step], bits[-edge:]):
        for begin in range(part.start, part.stop, CHUNK * part.step):
            stop = min(part.stop, begin + CHUNK * part.step)
            yield np.arange(begin, stop, part.step, dtype=np.uint32).view(np.float32)


class Worst(NamedTuple):
    ulp: float = 0.0
    at: float = 0.0


def check_function(
    cpp: ModuleType,
    name: str,
    truth: Callable[[Array], Array],
    domain: list[range],
    step: int,
    bound: Callable[[Array, str], Array | float],
) -> None:
    """Asserts that errors stay below `bound(x, instruction_set)`, in ulp, and NaN below stays
    NaN."""
    sets = cpp.instruction_sets()
    worst = dict.fromkeys(sets, Worst())
    for bits in domain:
        for x in floats(bits, step):
            exact = truth(x.astype(np.float64))
            ulp = np.spacing(np.maximum(np.abs(exact), SMALLEST_NORMAL).astype(np.float32))
            found = {level: getattr(cpp, name)(x, level) for level in sets}
            for level, y in found.items():
                error = np.abs(y.astype(np.float64) - exact) / ulp
                # Kernels run with results below the normal numbers flushed to zero.
                error[(y == 0) & (np.abs(exact) < SMALLEST_NORMAL)] = 0
                assert (error <= bound(x, level)).all(), (level, x[~(error <= bound(x, level))][:5])
                i = int(error.argmax())
                worst[level] = max(worst[level], Worst(float(error[i]), float(x[i])))
            with_fused = [y.view(np.uint32) for level, y in found.items() if level != "baseline"]
            for y in with_fused[1:]:
                assert np.array_equal(y, with_fused[0])
    for bits in NANS:
        for x in floats(bits, step):
            for level in sets:
                assert np.isnan(getattr(cpp, name)(x, level)).all(), level
    for level, (ulp, at) in worst.items():
        print(f"{name} on {level}: at most {ulp:.2f} ulp, at {at!r}")


@EVERY
def test_exp(cpp: ModuleType, step: int) -> None:
    def bound(x: Array, level: str) -> Array:
        slope = 7.5e-8 if level == "baseline" else 1.5e-8
        return (2e-7 + slope * np.abs(x)) / 2.0**-24

    check_function(cpp, "exp", np.exp, [range(MINUS_ZERO, MINUS_86)], step, bound)
    for x in floats(range(MINUS_86, MINUS_INFINITY + 1), step):
        for level in cpp.instruction_sets():
            assert not cpp.exp(x, level).any(), level


@EVERY
def test_log(cpp: ModuleType, step: int) -> None:
    check_function(cpp, "log", np.log, [range(ONE_HALF, INFINITY)], step, lambda x, level: 2.0)


@EVERY
def test_tanh(cpp: ModuleType, step: int) -> None:
    domain = [range(ZERO, INFINITY + 1), range(MINUS_ZERO, MINUS_INFINITY + 1)]
    check_function(cpp, "tanh", np.tanh, domain, step, lambda x, level: 4.0)


@EVERY
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
def test_rounding_to_half_precision(cpp: ModuleType, name: str, step: int) -> None:
    """Numbers have the bits that numpy and torch give them, and NaN stays NaN."""
    mantissa = 0x7F if name == "bfloat16" else 0x3FF
    for x in floats(range(END), step):
        if name == "float16":
            expected = x.astype(np.float16).view(np.uint16)
        else:
            expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
        number = ~np.isnan(x)
        for level in cpp.instruction_sets():
            y = getattr(cpp, f"narrow_{name}")(x, level)
            assert np.array_equal(y[number], expected[number]), level
            nan = y[~number] & 0x7FFF
            assert (nan > 0x7FFF - mantissa).all(), level
            if name == "bfloat16":
                assert (y[~number] == 0x7FC0).all(), level


def test_rounding_to_bfloat16_beside_denormals_and_nan() -> None:
    """One lane that an instruction set has to treat on its own, among ordinary ones."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    special = np.array(
        [0, 1, 0x7FFFFF, 0x7F8000, 0x800000, INFINITY, INFINITY + 1, 0x7FC12345, 0x7FFFFFFF],
        dtype=np.uint32,
    )
    special = np.concatenate([special, special | np.uint32(MINUS_ZERO)])
    x = np.random.default_rng(0).normal(size=(len(special), 71)).astype(np.float32)
    for row, bits in enumerate(special):
        x.view(np.uint32)[row, row * 4] = bits
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy().copy()
    expected[np.isnan(x)] = 0x7FC0
    for level in cpp.instruction_sets():
        for row in range(len(special)):
            assert np.array_equal(cpp.narrow_bfloat16(x[row], level), expected[row]), (level, row)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_half_precision(cpp: ModuleType, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits).view(dtype).float().numpy()
    name = f"widen_{str(dtype).removeprefix('torch.')}"
    for level in cpp.instruction_sets():
        y = getattr(cpp, name)(bits, level)
        number = ~np.isnan(expected)
        assert np.array_equal(y.view(np.uint32)[number], expected.view(np.uint32)[number]), level
        assert np.isnan(y[~number]).all(), level


def test_odd_lengths_and_shapes() -> None:
    """Vectors that are only partly filled; the arrays that the other tests use fill nearly all."""
    cpp = pytest.importorskip("tests.helpers.cpp", reason="built only with ESPER_TESTING=1")
    for level in cpp.instruction_sets():
        for n in (0, 1, 3, 7, 15, 16, 17, 33):
            x = np.linspace(-80, 0, n, dtype=np.float32)
            np.testing.assert_allclose(cpp.exp(x, level), np.exp(x.astype(np.float64)), rtol=6e-6)
        assert cpp.tanh(np.zeros((2, 3), np.float32), level).shape == (2, 3)
    with pytest.raises(ValueError, match="lacks sse"):
        cpp.exp(np.zeros(1, np.float32), "sse")
