"""The kernel tests once more on other builds of the ops: with sanitizers, and for other
machines."""

from pathlib import Path

import pytest

from esper_kernels.native import INSTRUCTION_SETS
from tests.helpers.builds import (
    AVX512_SHIM,
    KERNELS,
    SANITIZERS,
    copy_with_ops,
    run_python,
    sanitizer_environment,
)

NAMES = (
    "cross_entropy",
    "cross_entropy_step",
    "cross_entropy_inputs",
    "grad_stats",
    "cpp",
    "cpp_any_input",
    "class_shards",
    "measures",
    "divided_measures",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_kernel_tests(folder: Path, *more: str, **variables: str) -> None:
    files = [f"tests/kernels/test_{name}.py" for name in (*NAMES, *more)]
    # of what the backends take in turn, every case
    options = ["-q", "-x", "-m", "(not slow or in_turn) and not long", "-p", "no:cacheprovider"]
    # these backends compute nothing with the library
    options += ["-k", "not eager and not triton"]
    run_python(["-m", "pytest", *options, *files], folder, **variables)


def instruction_sets(folder: Path) -> list[str]:
    code = "from esper_kernels.native import INSTRUCTION_SETS; print(*INSTRUCTION_SETS)"
    return run_python(["-c", code], folder).split()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_ops(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def test_kernels_are_clean_under_sanitizers(sanitized: Path) -> None:
    run_kernel_tests(sanitized, "cpp_limits", **sanitizer_environment())


def test_many_random_calls_are_clean_under_sanitizers(sanitized: Path) -> None:
    run_python(["tests/kernels/test_fuzz.py", "20000"], sanitized, **sanitizer_environment())


def test_avx512_kernels_on_a_machine_with_avx2(tmp_path: Path) -> None:
    if "avx512" in INSTRUCTION_SETS:
        pytest.skip("this machine has AVX-512: every kernel test has used it")
    if "avx2" not in INSTRUCTION_SETS:
        pytest.skip("this machine has no AVX2")
    folder = copy_with_ops(tmp_path, "-O2", *AVX512_SHIM)
    assert instruction_sets(folder) == ["avx512bf16", "avx512", "avx2", "baseline"]
    run_kernel_tests(folder)


def test_kernels_without_anything_of_x86(tmp_path: Path) -> None:
    """Other machines compile the baseline, by the compiler's vectors alone."""
    sources = []
    for path in KERNELS:
        sources.append(tmp_path / path.name)
        undefined = "".join(f"#undef {macro}\n" for macro in ("__x86_64__", "__SSE2__"))
        # These headers have to know the real machine.
        headers = "#include <utility>\n#include <cstdint>\n#include <cstring>\n"
        sources[-1].write_text(f'{headers}{undefined}#include "{path}"\n', encoding="utf-8")
    folder = copy_with_ops(tmp_path, "-O2", sources=tuple(sources))
    assert instruction_sets(folder) == ["baseline"]
    run_kernel_tests(folder)
