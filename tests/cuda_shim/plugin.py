"""pytest -p tests.cuda_shim.plugin: what tests of the `cpp` backend call are the CUDA kernels, run on the host.

ESPER_SHIM names the library that `build` made; ESPER_SHIM_DEVICE, where set, the make-believe device as numbers:
multiprocessors, bytes of shared memory, architecture, and 1 to run threads and blocks from the last to the first.
"""

import ctypes
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import native
from esper_kernels.cross_entropy import reference


class _Op:
    """An op of the library; a bad target on the CPU is refused before, as everywhere."""

    def __init__(self, name: str) -> None:
        self.op = getattr(torch.ops.esper_shim, name)

    def default(self, *arguments: Any) -> None:
        logits, targets, _, ignore_index = arguments[:4]
        if self.op.__name__ == "cross_entropy" and isinstance(logits, Tensor):
            reference.refuse_bad_targets(targets, logits.shape[-1], ignore_index)
        self.op.default(*arguments)


class _Ops:
    def __init__(self) -> None:
        for name in ("cross_entropy", "cross_entropy_backward", "grad_stats"):
            setattr(self, name, _Op(name))


def pytest_configure(config: pytest.Config) -> None:
    library = os.environ["ESPER_SHIM"]
    torch.ops.load_library(library)
    if device := os.environ.get("ESPER_SHIM_DEVICE"):
        ctypes.CDLL(library).esper_shim_device(*map(int, device.split()))
    torch.ops.esper = _Ops()  # type: ignore[assignment]
    native.ROAD = None
