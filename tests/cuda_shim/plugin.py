"""pytest -p tests.cuda_shim.plugin: tests of the `cpp` backend call the CUDA kernels, run on the
host.

ESPER_SHIM may name the library, see `build.load`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels.ops.cross_entropy import reference
from tests.cuda_shim.build import load


class _Op:
    """An op of the library; a bad target on the CPU is refused before, as everywhere."""

    def __init__(self, name: str) -> None:
        self.op = getattr(torch.ops.esper_shim, name)

    def default(self, *arguments: Any) -> None:
        logits, targets, _, ignore_index = arguments[:4]
        if (
            self.op.__name__ == "cross_entropy"
            and isinstance(logits, Tensor)
            and isinstance(targets, Tensor)
        ):
            reference.refuse_bad_targets(targets, logits.shape[-1], ignore_index)
        self.op.default(*arguments)


class _Ops:
    def __init__(self) -> None:
        for name in (
            "cross_entropy",
            "cross_entropy_backward",
            "token_logprobs",
            "token_logprobs_backward",
            "grad_stats",
        ):
            setattr(self, name, _Op(name))


def pytest_configure(config: pytest.Config) -> None:
    load()
    torch.ops.esper = _Ops()  # type: ignore[assignment]
