"""Devices by name and groups of processes, with errors that name the argument."""

import torch
import torch.distributed as dist


def device_of(device: object) -> torch.device:
    """The device of this name. TypeError for what is no name, ValueError if there is no such
    device."""
    if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
        raise TypeError(
            f'device must be a torch.device or its name, such as "cpu" or "cuda:0", got {device!r}'
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device must be the name of a device, such as "cpu" or "cuda:0", got {device!r}'
        ) from error


def check_group(group: object) -> None:
    """TypeError for what is no group of processes. `dist.new_group` gives a number to a process
    outside of the new group."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup to which this process belongs, or None "
            f"for all ranks, got {group!r:.80}"
        )
