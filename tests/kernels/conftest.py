"""Every kernel test runs once for each backend; a new backend joins by its name in BACKENDS."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined: they run on CPU tensors


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
