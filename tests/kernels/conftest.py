"""Every kernel test runs once for each backend; a new backend joins by its name in BACKENDS."""

import os

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton asks for it once, when it is first imported: later.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from esper_kernels import KernelConfig, select_backend
from esper_kernels.native import INSTRUCTION_SETS

# What a set other than the machine's best adds is arithmetic; the slow tests run everything on it again.
BACKENDS = (
    "eager",
    "cpp",
    "triton",
    pytest.param("cpp-avx2", marks=pytest.mark.slow),
    pytest.param("cpp-baseline", marks=pytest.mark.slow),
)


@pytest.fixture(params=BACKENDS)
def config(request: pytest.FixtureRequest) -> KernelConfig:
    name, _, instruction_set = request.param.partition("-")
    if name == "triton":
        pytest.importorskip("triton")
        on_cpu = "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu"
        if on_cpu and torch.cuda.is_available():
            pytest.skip("where there is a GPU, Triton's kernels run on it and not in the interpreter")
    if name != "cpp":
        return KernelConfig(backend=name)
    if instruction_set not in ("", *INSTRUCTION_SETS):
        pytest.skip(f"this machine has no {instruction_set}")
    # By default cpp serves all but float64; asked for by name it would refuse that.
    config = KernelConfig(instruction_set=instruction_set or "auto")
    assert select_backend("cross_entropy", "cpu", torch.float32, config).name == "cpp"
    return config


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits_dtype(request: pytest.FixtureRequest, config: KernelConfig) -> torch.dtype:
    """A dtype of logits whose gradient the backend can write: parametrized indirectly."""
    dtype: torch.dtype = request.param
    if config.backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by eager only")
    if config.backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter loses carries when it rounds to bfloat16")
    return dtype
