"""Train a controller with MaskablePPO of sb3-contrib, in a directory of its own.

The directory has `config.json`, a line of `progress.jsonl` per update, checkpoints, and at the end
`policy.pt`. A checkpoint holds tensors and plain values alone, and is that of an update: an
interrupted training is resumed from the last one, bit for bit, and reports the updates after it
again.
"""

import importlib.util
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize

from esper_train.base.device import plain_defaults
from esper_train.base.settings import differing
from esper_train.base.state import CPU, RandomState, copied
from esper_train.base.stop import StopRequest
from esper_train.config import SEED_STEP, RunConfig
from esper_train.rl.env import MorphogenesisEnv
from esper_train.rl.learned import PolicySpaces, SavedPolicy, actor_weights
from esper_train.rl.vector import make_vector
from esper_train.run.checkpoint import FORMAT, drop_old, load, save, saved
from esper_train.run.directory import CHECKPOINTS, POLICY, claimed, create
from esper_train.run.start import run_heuristic_episode
from esper_train.tasks import Task

PROGRESS = "progress.jsonl"
CURVES = "tensorboard"
UPDATE = {
    "entropy_loss": "train/entropy_loss",
    "value_loss": "train/value_loss",
    "policy_loss": "train/policy_gradient_loss",
    "kl": "train/approx_kl",
}
"""Numbers of an update, and the names that Stable-Baselines3 logs them by."""
FREE = (
    "rl.steps",
    "rl.choose",
    "rl.evaluate_every",
    "rl.evaluations",
    "rl.tensorboard",
    "checkpoint.keep",
)
"""Settings that may change when a training is resumed."""
LARGEST_REWARD = 10.0
"""Rewards over the running standard deviation of returns are clipped to this magnitude."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects whose state PPO changes while it trains."""

    model: MaskablePPO
    rewards: VecNormalize
    hosts: list[MorphogenesisEnv]

    def state_dict(self, update: int, config: RunConfig) -> dict[str, Any]:
        """Everything after an update, as tensors and plain values."""
        parameters = self.model.get_parameters()
        scale = self.rewards.ret_rms
        plain = {
            "config": asdict(config),
            "update": update,
            "steps": self.model.num_timesteps,
            "scale": [float(scale.mean), float(scale.var), float(scale.count)],
            "returns": self.rewards.returns.tolist(),
            "hosts": [host.state_dict() for host in self.hosts],
            "episodes": list(self.model.ep_info_buffer or ()),
            "starts": numpy.asarray(self.model._last_episode_starts).tolist(),
        }
        state = {
            "format": FORMAT,
            "about": json.dumps(plain),
            "policy": parameters["policy"],
            "optimizer": parameters["policy.optimizer"],
            "observations": torch.as_tensor(self.model._last_obs, device="cpu"),
        }
        found: dict[str, Any] = copied(state, "cpu")
        return found

    def load_state_dict(self, state: Mapping[str, Any], config: RunConfig) -> int:
        """Bring a training that was just made to a state; returns its update. Hosts train their
        episodes again. `ValueError` if the config changed other settings than `FREE`."""
        plain = json.loads(state["about"])
        _require_same_settings(plain["config"], asdict(config))
        model = self.model
        model.set_parameters(
            {"policy": state["policy"], "policy.optimizer": state["optimizer"]}, exact_match=True
        )
        model._last_obs = state["observations"].numpy()
        model._last_episode_starts = numpy.array(plain["starts"])
        model.num_timesteps = plain["steps"]
        model.ep_info_buffer = deque(plain["episodes"], maxlen=model._stats_window_size)
        model.ep_success_buffer = deque(maxlen=model._stats_window_size)
        mean, var, self.rewards.ret_rms.count = plain["scale"]
        self.rewards.ret_rms.mean = numpy.array(mean)
        self.rewards.ret_rms.var = numpy.array(var)
        self.rewards.returns = numpy.array(plain["returns"])
        for host, its in zip(self.hosts, plain["hosts"], strict=True):
            host.load_state_dict(its)
        return int(plain["update"])

    def saved_policy(self) -> SavedPolicy:
        """The actor as it is now."""
        host = self.hosts[0]
        spaces = PolicySpaces(
            slots=host.table.slots,
            blueprints=host.table.blueprints,
            blends=host.table.blends,
            observation=tuple(name for name, _, _ in host.observer.ranges()),
            actions=host.table.names(),
            task=host.config.task,
            reward=host.config.reward,
            max_epochs=host.config.max_epochs,
            steps=self.model.num_timesteps,
        )
        return SavedPolicy(spaces, actor_weights(self.model.policy.state_dict()))


def _require_same_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = differing([was, now])
    words = [f"{path} was {old} and is {new}" for path, (old, new) in changed.items()]
    wrong = [word for path, word in zip(changed, words, strict=True) if path not in FREE]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}; a resumed training may change {', '.join(FREE)}, others need a "
            "new one"
        )


def train_ppo(
    config: RunConfig,
    out: Path,
    *,
    task: Task | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda words: None,
    stop: StopRequest | None = None,
) -> SavedPolicy:
    """Train until `config.rl.steps`, and write what the module says into `out`.

    Hosts train with the seeds config.seed to config.seed + hosts - 1, then with those + 1000,
    + 2000, ...; evaluations have config.seed + 999 and those below. `stop` is asked before each
    epoch of the hosts and each episode of an evaluation; then `Stopped` is raised.

    Raises `ValueError` for a config that cannot run or a checkpoint that does not fit,
    `FileExistsError` if `out` is not empty and `resume` is false, and `BlockingIOError` if another
    process writes to it.
    """
    rl = config.rl
    if rl.hosts + rl.evaluations > SEED_STEP:
        raise ValueError(
            f"rl.hosts and rl.evaluations must be at most {SEED_STEP} together, so that their "
            f"seeds differ, got {rl.hosts} and {rl.evaluations}"
        )
    if rl.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("rl.tensorboard needs tensorboard: pip install 'esper-kernels[log]'")
    with claimed(out, resume=resume):
        random = RandomState(config.seed + 1, CPU)
        update = 0
        reported: int | None = 0
        with RandomState(config.seed, CPU).active(), plain_defaults():
            training = _make(config, task)
            newest = saved(out / CHECKPOINTS, "update")[-1:] if resume else []
            for path in newest:
                state = load(path, out / PROGRESS)
                update = training.load_state_dict(state, config)
                random.load_state_dict(state["random"])
                reported = state.get("metrics")  # None, of an older version, cuts nothing
                say(f"resuming after update {update}, {training.model.num_timesteps} steps")
        if not newest:
            create(out, config)
        with (out / PROGRESS).open("ab") as file:
            file.truncate(reported)
        training.model.set_logger(_logger(out, rl.tensorboard, training.model.num_timesteps))
        with random.active():
            _train(config, out, training, random, update, say, stop or StopRequest())
        policy = training.saved_policy()
        policy.save(out / POLICY)
        return policy


def _train(
    config: RunConfig,
    out: Path,
    training: Training,
    random: RandomState,
    update: int,
    say: Callable[[str], None],
    stop: StopRequest,
) -> None:
    """Rollout, update, evaluation, progress, checkpoint, until there were enough steps."""
    rl = config.rl
    model = training.model
    started = time.perf_counter()
    while model.num_timesteps < rl.steps:
        model.learn(
            rl.hosts * rl.rollout,
            callback=lambda *_: stop.before(True),
            reset_num_timesteps=False,
        )
        update += 1
        last = model.num_timesteps >= rl.steps
        due = last or (rl.evaluate_every > 0 and update % rl.evaluate_every == 0)
        line = {
            "update": update,
            "steps": model.num_timesteps,
            "seconds": time.perf_counter() - started,
            **_episode_means(model.ep_info_buffer or ()),
            **{name: float(model.logger.name_to_value[key]) for name, key in UPDATE.items()},
            "evaluation": evaluation(config, training, stop) if due else None,
        }
        model.logger.dump(model.num_timesteps)  # `learn` itself would write it with the next update
        reported = _report(out / PROGRESS, line)
        say(_in_words(line))
        data = io.BytesIO()
        state = training.state_dict(update, config)
        torch.save(state | {"random": random.state_dict(), "metrics": reported}, data)
        (out / CHECKPOINTS).mkdir(exist_ok=True)
        save(out / CHECKPOINTS / f"update-{update}.pt", data.getvalue())
        drop_old(out / CHECKPOINTS, config.checkpoint.keep, "update")


def _report(path: Path, line: Mapping[str, Any]) -> int:
    """Add a line, on disk before the checkpoint that follows it; returns the bytes of the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _make(config: RunConfig, task: Task | None) -> Training:
    rl = config.rl
    vector = make_vector(config, rl.hosts, task=task)
    rewards = VecNormalize(
        vector, norm_obs=False, norm_reward=True, clip_reward=LARGEST_REWARD, gamma=rl.gamma
    )
    model = MaskablePPO(
        "MlpPolicy",
        rewards,
        learning_rate=rl.learning_rate,
        n_steps=rl.rollout,
        batch_size=rl.batch,
        n_epochs=rl.passes,
        gamma=rl.gamma,
        gae_lambda=rl.gae_lambda,
        clip_range=rl.clip_range,
        ent_coef=rl.entropy,
        policy_kwargs={"net_arch": {"pi": [rl.width, rl.width], "vf": [rl.width, rl.width]}},
        seed=config.seed,
        device="cpu",  # a small network, called once per epoch of the hosts
    )
    return Training(model=model, rewards=rewards, hosts=vector.hosts)


def evaluation(config: RunConfig, training: Training, stop: StopRequest) -> dict[str, float]:
    """Means over the evaluation's episodes, each a run under the policy as it is now."""
    policy = training.saved_policy()
    task = training.hosts[0].task
    configs = [
        replace(config, seed=config.seed + SEED_STEP - 1 - number)
        for number in range(config.rl.evaluations)
    ]
    results = [
        run_heuristic_episode(each, task=task, policy=policy.maker(each))
        for each in map(stop.before, configs)
    ]
    return {
        "return": fmean(math.fsum(result.rewards) for result in results),
        "accuracy": fmean(result.test.points for result in results),
        "cost": fmean(result.cost for result in results),
        "fossils": fmean(result.fossils for result in results),
    }


def _episode_means(episodes: Iterable[Mapping[str, float]]) -> dict[str, float | None]:
    """The mean over the last episodes of training, at most 100."""
    done = list(episodes)
    names = {"return": "r", "length": "l", "accuracy": "accuracy", "cost": "cost"}
    values = {name: [each[key] for each in done if key in each] for name, key in names.items()}
    return {name: fmean(found) if found else None for name, found in values.items()}


def _in_words(line: Mapping[str, Any]) -> str:
    words = f"update {line['update']}, {line['steps']} steps, {line['seconds']:.0f} s"
    if line["return"] is not None:
        words += f": return {line['return']:.3f}"
    if line["evaluation"] is not None:
        found = line["evaluation"]
        words += f"; evaluation: return {found['return']:.3f}, accuracy {found['accuracy']:.2f}%"
    return words


def _logger(out: Path, tensorboard: bool, done: int) -> Logger:
    """`done` is the number of steps so far: the records of later ones are hidden."""
    if not tensorboard:
        return Logger(folder=None, output_formats=[])
    from torch.utils.tensorboard import SummaryWriter

    curves = TensorBoardOutputFormat(str(out / CURVES))
    curves.writer.close()
    curves.writer = SummaryWriter(str(out / CURVES), purge_step=done + 1)
    return Logger(folder=None, output_formats=[curves])
