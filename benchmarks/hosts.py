"""Steps per second of several hosts in one process, next to as many processes.

    python -m benchmarks hosts    # on a quiet machine: 1, 2, 4, 8 and 16 hosts on digits

A step is one epoch of one host, under random legal actions. One process has torch's own number of
threads, and as many processes share the cores evenly, with at least one thread each. Writes
`results/hosts.json`.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy
import torch
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from benchmarks import record
from esper_train import RunConfig
from esper_train.config import preset
from esper_train.rl.env import MorphogenesisEnv
from esper_train.rl.vector import make_vector


def steps_per_second(vector: VecEnv, rounds: int) -> float:
    """Steps of all hosts together, after a first round that does not count."""
    draw = numpy.random.default_rng(0)
    vector.reset()
    started = 0.0
    for number in range(1 + rounds):
        if number == 1:
            started = time.perf_counter()
        masks = vector.env_method("action_masks")
        vector.step(numpy.array([draw.choice(numpy.flatnonzero(mask)) for mask in masks]))
    return vector.num_envs * rounds / (time.perf_counter() - started)


def build_alone(config: RunConfig, threads: int) -> MorphogenesisEnv:
    """The environment of one process; more threads than cores would wait for each other."""
    torch.set_num_threads(threads)
    return MorphogenesisEnv(config)


def measure(config: RunConfig, hosts: int, rounds: int) -> dict[str, Any]:
    """Measure in one process, then in as many as there are hosts."""
    together = make_vector(config, hosts)
    row = {"hosts": hosts, "one process": steps_per_second(together, rounds)}
    together.close()
    threads = max(1, len(os.sched_getaffinity(0)) // hosts)
    makers = [
        partial(build_alone, replace(config, seed=config.seed + host), threads)
        for host in range(hosts)
    ]
    apart = SubprocVecEnv(makers, start_method="spawn")  # type: ignore[arg-type]
    row["processes"] = steps_per_second(apart, rounds)
    apart.close()
    return row


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: one row per number of hosts."""
    lines = [["hosts", "steps/s in one process", "steps/s in as many processes"]]
    lines += [
        [str(row["hosts"]), f"{row['one process']:.1f}", f"{row['processes']:.1f}"]
        for row in figures
    ]
    return record.markdown(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = record.parser("hosts", __doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    config = replace(preset("digits"), max_epochs=40, batch_size=128)
    figures = []
    for hosts in options.hosts:
        figures.append(measure(config, hosts, options.rounds))
        print(f"{hosts} hosts: {figures[-1]}", flush=True)
    path = record.write("hosts", figures)
    print(f"\n{table(figures)}\n\n{path}")


if __name__ == "__main__":
    main()
