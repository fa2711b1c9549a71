"""MixUp, and class weights for classes of which some are rare.

python examples/mixup.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from esper_kernels import Meter, cross_entropy

EPOCHS = 10
ALPHA = 0.2
"""Of the beta distribution from which MixUp draws its shares (Zhang et al., 2018)."""


def main() -> None:
    torch.manual_seed(0)
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    rare = digits == 9
    kept = ~rare | (torch.rand(len(digits)) < 0.2)  # a fifth of the nines
    inputs, targets = images[kept].float() / 16, digits[kept]
    counts = targets.bincount(minlength=10)
    weight = len(targets) / (10 * counts)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    meter = Meter("cpu")
    beta = torch.distributions.Beta(ALPHA, ALPHA)
    for _ in range(EPOCHS):
        meter.reset()
        for rows in torch.randperm(len(targets)).split(64):
            others = rows[torch.randperm(len(rows))]
            share = beta.sample((len(rows),))
            mixed = share[:, None] * inputs[rows] + (1 - share[:, None]) * inputs[others]
            loss = cross_entropy(
                model(mixed),
                targets[rows],
                targets2=targets[others],
                share=share,
                weight=weight,
                meter=meter,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = meter.compute()
    with torch.no_grad():
        right = model(inputs).argmax(1) == targets
    print(
        f"loss {result.loss:.4f}, {result.accuracy:.1%} of the mixed rows right; "
        f"{right.double().mean():.1%} of all and {right[targets == 9].double().mean():.1%} of the "
        "nines"
    )


if __name__ == "__main__":
    main()
