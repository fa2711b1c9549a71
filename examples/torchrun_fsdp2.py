"""Several processes that each hold a part of one network, with torch's `fully_shard` (FSDP2).

torchrun --nproc-per-node=2 examples/torchrun_fsdp2.py

A loop of your own; `esper-train` has `--distributed.strategy fsdp2`: docs/distributed.md.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from esper_kernels import Meter, cross_entropy_step, grad_stats
from esper_train import get_task


def whole_norm(model: nn.Module) -> Tensor:
    """The norm of the whole gradients, from those of this process's parts."""
    grads = [p.grad for p in model.parameters()]
    squared = grad_stats([x.to_local() for x in grads if isinstance(x, DTensor)]).total_norm ** 2
    dist.all_reduce(squared)
    return squared.sqrt()


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = TensorDataset(*get_task("digits").load().train)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[1], model[3], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    meter = Meter("cpu")
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        meter.reset()
        for inputs, targets in loader:
            logits = model(inputs)  # whole: this process's rows, all classes
            logits.backward(cross_entropy_step(logits, targets, meter))
            norm = whole_norm(model)
            clip_grads_with_norm_(model.parameters(), 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
        meter.all_reduce()  # once per epoch: the rows of all processes
        result = meter.compute()
        if dist.get_rank() == 0:
            found = f"{result.valid} rows, {result.accuracy:.1%} right"
            print(f"epoch {epoch}: {found}, last gradient norm {norm:.3f}")
    dist.destroy_process_group()
    # FSDP2 keeps gloo's threads. Before Python 3.14, one that still frees a tensor while Python
    # shuts down aborts the process, so this one ends without that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
