"""Several processes that train one network with torch's DistributedDataParallel.

torchrun --nproc-per-node=2 examples/torchrun_ddp.py

`esper-train` needs no DistributedDataParallel: docs/distributed.md.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from esper_kernels import Meter, cross_entropy
from esper_train import get_task


def main() -> None:
    dist.init_process_group("gloo")
    train()
    # The network must be gone by now. If it is the last to hold the group, it waits for a thread of
    # the group, which may in turn wait for Python.
    dist.destroy_process_group()


def train() -> None:
    torch.manual_seed(0)
    splits = get_task("digits").load()
    data = TensorDataset(*splits.train)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    meter = Meter("cpu")
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        meter.reset()
        for inputs, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets, meter=meter).backward()
            optimizer.step()
        meter.all_reduce()  # once per epoch: the rows of all processes
        result = meter.compute()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: {result.valid} rows, {result.accuracy:.1%} right")


if __name__ == "__main__":
    main()
