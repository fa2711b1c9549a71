"""The one place that decides where a step writes the gradient of the logits.

Fresh memory of the size of large logits costs more than computing their gradient, so memory is used
again wherever nobody else can see it.
"""

import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Destination:
    """The memory that a gradient is written to: the logits, `out`, or, with neither, new memory."""

    inplace: bool = False
    out: Tensor | None = None


class GradientMemory:
    """Memory for the gradient of the logits, owned by one step object and kept between batches."""

    def __init__(self) -> None:
        self._workspace: Tensor | None = None

    def destination(self, logits: Tensor) -> Destination:
        """The memory to which the gradient of `logits` may be written.

        Args:
            logits: the values of the model's output, as `detach` gives them. The caller must have
                given up the output itself: then any holder that is left is somebody else: autograd,
                which saved it for the backward pass; a hook; the model; a parameter.

        Returns:
            Over the logits where nobody else holds their memory; otherwise a workspace, which is
            made anew if somebody, such as a hook that stores gradients, still holds the last one.
            New memory on devices whose allocator makes that free, and for logits with gaps in
            memory.
        """
        if not logits.is_cpu or not (logits.is_contiguous() or _is_dense(logits)):
            return Destination()
        if held_only_here(logits):
            return Destination(inplace=True)
        workspace = self._workspace
        fits = workspace is not None and (
            (workspace.shape, workspace.stride(), workspace.dtype)
            == (logits.shape, logits.stride(), logits.dtype)
        )
        if workspace is None or not fits or not held_only_here(workspace):
            self._workspace = workspace = torch.empty_like(logits)
        # Another tensor object on the same memory: one that is kept shows in the count of holders.
        return Destination(out=workspace.detach())


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, each its own, in whatever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(x))


def held_only_here(tensor: Tensor) -> bool:
    """Whether no other tensor object uses the memory of `tensor`.

    Autograd's saved tensors, views, `detach()`, arrays of numpy, exports by DLPack and storage
    objects all count.
    """
    return _users(tensor) == _one_user()


@cache
def _one_user() -> tuple[int, int]:
    return _users(torch.empty(1, device="cpu"))


def _users(tensor: Tensor) -> tuple[int, int]:
    """Users of the memory, as torch's own CUDA graph trees count them, and of the storage object,
    which is the same for everybody. Both include this function."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)
