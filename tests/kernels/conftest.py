"""Every kernel test runs once for each backend; a new backend joins by its name in BACKENDS."""

import pytest
import torch

from esper_kernels import KernelConfig

BACKENDS = ("eager",)


@pytest.fixture(params=BACKENDS)
def config(request: pytest.FixtureRequest) -> KernelConfig:
    return KernelConfig(backend=request.param)


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
