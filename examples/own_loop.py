"""A training loop of your own with the kernels: loss, accuracy and gradients, read once per epoch.

python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_kernels import Meter, compute_all, cross_entropy_step, grad_stats

torch.manual_seed(0)
images, digits = map(torch.tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, digits)
loader = DataLoader(data, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
meter = Meter("cpu", topk=(1, 3))
for epoch in range(1, 6):
    meter.reset()
    for inputs, targets in loader:
        logits = model(inputs)
        logits.backward(cross_entropy_step(logits, targets, meter))
        stats = grad_stats([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    result, health = compute_all(meter, stats)  # the only host sync of the epoch
    print(
        f"epoch {epoch}: loss {result.loss:.4f}, {result.accuracy:.1%} right, "
        f"{result.accuracy_at(3):.1%} among the first 3, gradient norm {health.gradient_norm:.3f}"
    )
