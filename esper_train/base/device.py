"""Devices by name, and tensors that do not depend on the defaults of the process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """A context in which new tensors are float32 on the CPU, whatever `torch.set_default_dtype` and
    `torch.set_default_device` say outside."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def resolve_device(name: str) -> torch.device:
    """The torch device of this name; `ValueError` if the name is invalid or the device cannot be
    used here."""
    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        usable += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no name of a device; usable: {', '.join(usable)}") from error
    if f"{device.type}:{device.index or 0}" not in ("cpu:0", *usable):
        raise ValueError(f"device {name!r} does not exist here; usable: {', '.join(usable)}")
    return device
