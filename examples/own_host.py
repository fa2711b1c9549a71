"""A network of your own that grows: cut it into segments, and each has room for seeds behind it.

python examples/own_host.py
"""

import torch
from torch import Tensor, nn

from esper_train import Host, HostConfig, RunConfig, Splits, Task, run_heuristic_episode
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import ConsoleSink


class Encoder(nn.Module):
    """The first half of the network; anything that gives features [N, C] will do."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.linear(x)))


def build_host(config: HostConfig) -> Host:
    width = config.width or 4
    segments = {
        "early": Encoder(6, width),
        "late": nn.Sequential(nn.Linear(width, width), nn.ReLU()),
    }
    channels = dict.fromkeys(segments, width)
    return Host("features", segments, nn.Linear(width, 3), channels)


def load() -> Splits:
    """Rows whose class is the largest of three sums of products."""
    inputs = torch.randn(900, 6, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, :3] * inputs[:, 3:]).argmax(1)
    parts = list(zip(inputs.split(300), targets.split(300), strict=True))
    return Splits(train=parts[0], validation=parts[1], test=parts[2])


task = Task(
    name="products", task_type="classification", num_classes=3, load=load, build_host=build_host
)


def main() -> None:
    config = RunConfig(max_epochs=100, batch_size=50, slots=("early", "late"))
    result = run_heuristic_episode(config, task=task, hub=TelemetryHub([ConsoleSink()]))
    print(
        f"test accuracy {result.test.accuracy:.1%} with {result.parameters} parameters, "
        f"{result.fossils} seeds kept, {result.undone} taken back"
    )


if __name__ == "__main__":
    main()
