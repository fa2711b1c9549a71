"""The order in which the eager backends add numbers up."""

from torch import Tensor

# torch splits one sum of 32768 or more numbers among its CPU threads, and its last bits with it.
_CHUNK = 16384


def ordered_sum(x: Tensor) -> Tensor:
    """Sum x [..., n] over its last dimension, in an order that the number of CPU threads does not
    change."""
    n = x.shape[-1]
    if n <= _CHUNK:
        return x.sum(-1)
    whole = n - n % _CHUNK
    chunks = x[..., :whole].unflatten(-1, (-1, _CHUNK)).sum(-1)  # [..., n // _CHUNK]
    return ordered_sum(chunks) + x[..., whole:].sum(-1)
