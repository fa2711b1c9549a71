"""Every kernel test runs once for each backend; a new backend joins by its name and devices in
BACKENDS.

A test that takes `config` alone makes CPU tensors, or CUDA tensors where it is marked `gpu`; one
that takes `device` too runs on both. `best_instructions` leaves out the instruction sets that are
slower here. `in_turn` deals the cases of a test out to the backends: the quick part runs each case
on one of them, and each backend has its share; the slow part runs the others. What is slow in any
case runs on one backend in the slow part, and on the others in the long part.
"""

from importlib.util import find_spec

import pytest
import torch

from esper_kernels import KernelConfig, select_backend
from esper_kernels.native import INSTRUCTION_SETS
from tests.helpers.interpreter import patch_the_language_once
from tests.helpers.turns import deal_out

if find_spec("triton") is not None:
    patch_the_language_once()

BACKENDS = {
    "eager": ("cpu", "cuda"),
    "cpp": ("cpu",),
    "triton": ("cpu", "cuda"),
    "cuda": ("cuda",),
    # These differ from the machine's best in their arithmetic only, so the quick tests leave them
    # out.
    "cpp-avx512": ("cpu",),
    "cpp-avx2": ("cpu",),
    "cpp-baseline": ("cpu",),
}
ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
)
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="where there is a GPU, Triton's kernels run on it and not in the interpreter",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with `config` on each backend and on each device that it serves."""
    named_by_the_test = any(
        "config" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "config" not in metafunc.fixturenames or named_by_the_test:
        return
    takes_device = "device" in metafunc.fixturenames
    on_gpu = any(metafunc.definition.iter_markers("gpu"))
    devices = ("cpu", "cuda") if takes_device else ("cuda",) if on_gpu else ("cpu",)
    backends = list(BACKENDS)
    if any(metafunc.definition.iter_markers("best_instructions")):
        backends = [name for name in backends if not name.startswith("cpp-")]
    cases = []
    for device in devices:
        for backend in (name for name in backends if device in BACKENDS[name]):
            values = (backend, device) if takes_device else (backend,)
            cases.append(pytest.param(*values, marks=_marks(backend, device)))
    metafunc.parametrize("config,device" if takes_device else "config", cases, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    deal_out(items)


def _marks(backend: str, device: str) -> list[pytest.MarkDecorator]:
    marks = [*ON_CUDA] if device == "cuda" else []
    if backend.startswith("cpp-"):
        marks.append(pytest.mark.slow)
    if (backend, device) == ("triton", "cpu"):
        marks.append(INTERPRETED)
    return marks


@pytest.fixture
def config(request: pytest.FixtureRequest) -> KernelConfig:
    name, _, instruction_set = request.param.partition("-")
    if name == "triton":
        pytest.importorskip("triton")
    if name != "cpp":
        return KernelConfig(backend=name)
    if instruction_set not in ("", *INSTRUCTION_SETS):
        pytest.skip(f"this machine has no {instruction_set}")
    # By default cpp serves all but float64; asked for by name it would refuse that.
    config = KernelConfig(instruction_set=instruction_set or "auto")
    assert select_backend("cross_entropy", "cpu", torch.float32, config).name == "cpp"
    return config


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits_dtype(request: pytest.FixtureRequest, config: KernelConfig) -> torch.dtype:
    """A dtype of logits whose gradient the backend can write: parametrized indirectly."""
    dtype: torch.dtype = request.param
    if config.backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("float64 is served by eager only")
    if config.backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter loses carries when it rounds to bfloat16")
    return dtype
