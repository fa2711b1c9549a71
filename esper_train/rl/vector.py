"""Several hosts that train in lockstep in one process, for Gymnasium and for Stable-Baselines3.

They share the data. In a step, each host queues an epoch on the device, and one host sync reads the
results of all. A host whose episode is over begins the next in the same step, with 1000 added to
its seed.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, cast

import gymnasium
import numpy
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from esper_train.base.device import resolve_device
from esper_train.config import RunConfig
from esper_train.rl.data import shared
from esper_train.rl.env import MorphogenesisEnv, Observation, Step
from esper_train.rl.lockstep import Streams, Work, host_streams, in_lockstep
from esper_train.tasks import Task, get_task

Begun = tuple[Observation, dict[str, Any]]
"""First observation and info of an episode."""


class MorphogenesisVectorEnv(SyncVectorEnv[Observation, NDArray[numpy.int64]]):
    """`hosts` environments with the seeds `config.seed`, `config.seed` + 1, ...

    A vector environment of Gymnasium with the autoreset mode `SAME_STEP`: the last observation and
    info of an episode are in `infos["final_obs"]` and `infos["final_info"]`.
    `call("action_masks")` gives the masks.
    """

    def __init__(self, config: RunConfig, hosts: int, *, task: Task | None = None) -> None:
        super().__init__(_makers(config, hosts, task), autoreset_mode=AutoresetMode.SAME_STEP)
        self._hosts = cast(list[MorphogenesisEnv], self.envs)
        self._streams = host_streams(resolve_device(config.device), hosts)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Begun:
        """Begin an episode of every host. Several seeds are those of the hosts; one is that of the
        first, and the others have those after it."""
        if options:
            raise ValueError(f"expected no options, got {options}; hosts begin anew by themselves")
        hosts = range(self.num_envs)
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + host for host in hosts]
        else:
            seeds = list(seed)
        found = begun(self._hosts, seeds, self._streams)
        infos: dict[str, Any] = {}
        for host, (_, info) in enumerate(found):
            infos = self._add_info(infos, info, host)
        return numpy.stack([observation for observation, _ in found]), infos

    def step(
        self, actions: Any
    ) -> tuple[
        Observation,
        NDArray[numpy.float64],
        NDArray[numpy.bool_],
        NDArray[numpy.bool_],
        dict[str, Any],
    ]:
        """One epoch of every host."""
        observations = []
        infos: dict[str, Any] = {}
        steps = stepped(self._hosts, actions, self._streams)
        for host, ((observation, _, _, _, info), next_one) in enumerate(steps):
            if next_one is not None:
                final = {"final_obs": observation, "final_info": info}
                infos = self._add_info(infos, final, host)
                observation, info = next_one
            observations.append(observation)
            infos = self._add_info(infos, info, host)
        _, rewards, terminated, truncated, _ = zip(*(step for step, _ in steps), strict=True)
        return (
            numpy.stack(observations),
            numpy.array(rewards),
            numpy.array(terminated),
            numpy.array(truncated),
            infos,
        )


class LockstepVecEnv(DummyVecEnv):
    """The same for Stable-Baselines3, which takes vector environments of its own kind."""

    def __init__(self, config: RunConfig, hosts: int, *, task: Task | None = None) -> None:
        super().__init__(_makers(config, hosts, task))
        self.hosts = cast(list[MorphogenesisEnv], self.envs)
        self._streams = host_streams(resolve_device(config.device), hosts)

    def reset(self) -> Observation:
        """Begin an episode of every host, with the seeds that `seed` gave it last, if any."""
        found = begun(self.hosts, self._seeds, self._streams)
        self.reset_infos = [info for _, info in found]
        self._reset_seeds()
        self._reset_options()
        return numpy.stack([observation for observation, _ in found])

    def step_wait(self) -> VecEnvStepReturn:
        """One epoch of every host."""
        observations = []
        infos = []
        steps = stepped(self.hosts, self.actions, self._streams)
        for host, ((observation, _, _, _, info), next_one) in enumerate(steps):
            info["TimeLimit.truncated"] = False
            if next_one is not None:
                info["terminal_observation"] = observation
                observation, self.reset_infos[host] = next_one
            observations.append(observation)
            infos.append(info)
        rewards = numpy.array([step[1] for step, _ in steps], numpy.float32)
        dones = numpy.array([next_one is not None for _, next_one in steps])
        return numpy.stack(observations), rewards, dones, deepcopy(infos)


def make_vector(config: RunConfig, hosts: int, *, task: Task | None = None) -> LockstepVecEnv:
    """`hosts` environments in lockstep, as Stable-Baselines3 takes them."""
    return LockstepVecEnv(config, hosts, task=task)


def begun(
    hosts: Sequence[MorphogenesisEnv], seeds: Sequence[int | None], streams: Streams
) -> list[Begun]:
    """The first epoch of an episode of every host. A seed that is None goes on from the last."""
    works = [host.resetting(seed=seed) for host, seed in zip(hosts, seeds, strict=True)]
    return in_lockstep(works, streams)


def stepped(
    hosts: Sequence[MorphogenesisEnv], actions: Any, streams: Streams
) -> list[tuple[Step, Begun | None]]:
    """One step of every host, and the beginning of its next episode if one is over. All actions are
    checked before any is carried out."""
    steps = [host.stepping(action) for host, action in zip(hosts, actions, strict=True)]
    works = [_and_begin_anew(host, step) for host, step in zip(hosts, steps, strict=True)]
    return in_lockstep(works, streams)


def _and_begin_anew(host: MorphogenesisEnv, step: Work[Step]) -> Work[tuple[Step, Begun | None]]:
    done = yield from step
    _, _, terminated, truncated, _ = done
    over = terminated or truncated
    return done, (yield from host.resetting()) if over else None


def _makers(
    config: RunConfig, hosts: int, task: Task | None
) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
    """Each host has a config of its own, and all have the same data."""
    if hosts < 1:
        raise ValueError(f"expected at least one host, got {hosts}")
    task = shared(task or get_task(config.task, config.task_config()), config)
    return [
        partial(MorphogenesisEnv, replace(config, seed=config.seed + host), task=task)
        for host in range(hosts)
    ]
