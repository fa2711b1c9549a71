"""Several hosts that train in lockstep in one process, as Stable-Baselines3 takes them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gymnasium
from stable_baselines3.common.vec_env import DummyVecEnv

from esper_train.config import RunConfig
from esper_train.rl.data import shared
from esper_train.rl.env import MorphogenesisEnv
from esper_train.tasks import Task, get_task


def make_vector(config: RunConfig, hosts: int, *, task: Task | None = None) -> DummyVecEnv:
    """`hosts` environments that share the data, with the seeds `config.seed`, `config.seed` + 1,
    ...; each begins its next episode, with 1000 added to its seed, when one is over."""
    task = shared(task or get_task(config.task, config.task_config()), config)
    made: list[Callable[[], gymnasium.Env]] = [
        partial(MorphogenesisEnv, replace(config, seed=config.seed + host), task=task)
        for host in range(hosts)
    ]
    return DummyVecEnv(made)
