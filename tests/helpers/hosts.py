"""Network namespaces of one machine that stand in for hosts on a network, and the process that runs
on each of them.

`python -m tests.helpers.hosts DIRECTORY cut|resume` is that process.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper_train import DistributedConfig, RunConfig, run_fit
from esper_train.train.errors import RankLostError
from tests.helpers.ranks import tables

ROOT = Path(__file__).parents[2]
DEVICE = "eth0"
STEP = 12
"""The step before which the last host is cut off; there are five per epoch."""
CONFIG = RunConfig(
    max_epochs=4,
    batch_size=8,
    seed=5,
    keep="last",
    distributed=DistributedConfig(strategy="ddp", timeout=15.0),
)


@dataclass(frozen=True)
class Hosts:
    """Hosts on a switch of their own: names of namespaces, whose addresses are 10.0.0.1, ..."""

    names: tuple[str, ...]

    def connect(self, number: int) -> None:
        """Bring the link of a host up again."""
        _ip("-n", self.names[number], "link", "set", DEVICE, "up")

    def run(self, *arguments: str, seconds: float) -> list[int]:
        """Run this module on all hosts, as the ranks of one job; returns the exit codes."""
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", __name__, *arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "MASTER_ADDR": "10.0.0.1",
                    "MASTER_PORT": "29500",  # free, because the namespace is new
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(self.names)),
                    "GLOO_SOCKET_IFNAME": DEVICE,
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank, name in enumerate(self.names)
        ]
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make that many hosts, and a switch between them; skips where the machine does not permit
    them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("hosts stand for network namespaces, which need root and the command ip")
    switch = f"esper{os.getpid()}"
    names = tuple(f"{switch}-{number}" for number in range(count))
    try:
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr}")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            _ip("netns", "add", name)
            port = f"port{number}"
            ends = ["type", "veth", "peer", "name", DEVICE, "netns", name]
            _ip("-n", switch, "link", "add", port, *ends)
            _ip("-n", switch, "link", "set", port, "master", "bridge")
            _ip("-n", switch, "link", "set", port, "up")
            _ip("-n", name, "address", "add", f"10.0.0.{number + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", name, "link", "set", device, "up")
        yield Hosts(names)
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class CutOff:
    """An augmentation that takes the host of the last rank off the network before one step."""

    def __init__(self) -> None:
        self._steps = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self._steps += 1
        if self._steps == STEP and os.environ["RANK"] == "2":
            _ip("link", "set", DEVICE, "down")
        return inputs, targets


def main(directory: Path, case: str) -> None:
    """The run of one rank; leaves its error, or the network's weights."""
    torch.set_num_threads(1)
    task = tables(33) if case == "resume" else replace(tables(33), augment=CutOff())
    left = directory / f"{case}-{os.environ['RANK']}"
    try:
        result = run_fit(CONFIG, task=task, out=directory / "run", resume=case == "resume")
    except RankLostError as error:
        left.with_suffix(".json").write_text(json.dumps({"message": str(error)}))
        return
    torch.save(dict(result.model.state_dict()), left.with_suffix(".pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
