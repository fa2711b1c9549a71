"""Tensors whose memory does not hold their values."""

import torch
from torch import Tensor


def materialized(x: Tensor) -> Tensor:
    """x, or a copy if its memory holds -x, as that of `.conj().imag`, or there is none, as
    autograd's zeros.

    For code that passes addresses: torch's own ops and the compiled ones get such copies from the
    dispatcher.
    """
    if torch.compiler.is_compiling():
        return x
    return torch.zeros_like(x) if x._is_zerotensor() else x.resolve_neg()
