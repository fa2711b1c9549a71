"""The backends that serve divided classes, for tests."""

from types import ModuleType

import pytest
import torch

from esper_kernels.native import UNAVAILABLE
from esper_kernels.ops.vocab_parallel import cpp, triton
from esper_kernels.ops.vocab_parallel import reference as eager

EVERY_BACKEND = ["eager", "cpp", "triton"]
EVERY_DAY = ["eager", "cpp", pytest.param("triton", marks=pytest.mark.slow)]
"""Triton's interpreter is slow, so that one test with `EVERY_BACKEND` is enough for every day."""
needs_cpp = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def backend_module(name: str) -> ModuleType:
    """The module of a backend, for CPU tensors; skips where it does not serve them."""
    if name == "cpp" and UNAVAILABLE is not None:
        pytest.skip(UNAVAILABLE)
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton's kernels run on the GPU here and not in the interpreter")
    return {"eager": eager, "cpp": cpp, "triton": triton}[name]
