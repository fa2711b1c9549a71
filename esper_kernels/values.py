"""Whether a tensor has memory that holds its values, and a form of it that kernels can read."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def materialized(x: Tensor) -> Tensor:
    """x, or a copy if its memory holds -x, as that of `.conj().imag`, or there is none, as
    autograd's zeros.

    For code that passes addresses: torch's own ops and the compiled ones get such copies from the
    dispatcher.
    """
    if torch.compiler.is_compiling():
        return x
    return torch.zeros_like(x) if x._is_zerotensor() else x.resolve_neg()


def has_memory(x: Tensor) -> bool:
    """False where x has a shape only: traced by a compiler, on the meta device, or a fake one."""
    return not (
        torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor)
    )


def are_fake(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these have shapes but no memory, as under FakeTensorMode; TypeError if only some do.

    For code that passes addresses: torch's own ops and the compiled ones are never called for fake
    tensors.
    """
    fake = {isinstance(x, FakeTensor) for x in tensors if x is not None}
    if len(fake) > 1:
        raise TypeError(
            "expected either fake or real tensors, got both; make all of them under the same "
            "FakeTensorMode"
        )
    return True in fake


def has_plain_rows(x: Tensor) -> bool:
    """Whether Triton kernels can follow the strides of x [..., V]: contiguous, or at most two
    leading dimensions of rows whose classes are next to each other."""
    return x.is_contiguous() or (x.dim() <= 3 and (x.stride(-1) == 1 or x.shape[-1] == 1))


def plain_rows(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """Logits whose rows are [outer, inner] with class stride 1, the inner size, and both strides: a
    copy where they are not."""
    classes = logits.shape[-1]
    if logits.is_contiguous():
        return logits, logits.numel() // classes, 0, classes
    if not has_plain_rows(logits):
        return plain_rows(logits.contiguous())
    *outer, inner = logits.shape[:-1] or (1,)
    *outer_stride, inner_stride = logits.stride()[:-1] or (0,)
    return logits, inner, outer_stride[0] if outer else 0, inner_stride
