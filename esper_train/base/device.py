"""Devices by name."""

import torch


def resolve_device(name: str) -> torch.device:
    """The torch device of this name; `ValueError` if the name is invalid or the device cannot be used here."""
    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        usable += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} names no device; usable here: {', '.join(usable)}") from error
    if f"{device.type}:{device.index or 0}" not in ("cpu:0", *usable):
        raise ValueError(f"device {name!r} is not there; usable here: {', '.join(usable)}")
    return device
