"""The environment in which a controller learns: an episode grows one host, a step is one epoch.

It drives the same `EpisodeRun` as every run, so what it trains is that run's, bit for bit.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy
from gymnasium import spaces
from numpy.typing import NDArray

from esper_train.config import SEED_STEP, RunConfig
from esper_train.control.policy import Decision, Op
from esper_train.control.signals import Signals
from esper_train.rl.actions import ActionTable
from esper_train.rl.data import shared
from esper_train.rl.lockstep import Work, driven
from esper_train.rl.observation import Observer
from esper_train.run.episode import Episode
from esper_train.run.run import EpisodeResult, EpisodeRun, prepare
from esper_train.tasks import Task, get_task
from esper_train.train.errors import BadNumbersError

Observation = NDArray[numpy.float32]
Mask = NDArray[numpy.bool_]
Step = tuple[Observation, float, bool, bool, dict[str, Any]]
"""Observation, reward, terminated, truncated and info."""


class MorphogenesisEnv(gymnasium.Env[Observation, numpy.int64]):
    """A run of `config` under a controller from outside.

    An observation is what `Observer` makes of the last epoch, an action a place in `table`. A step
    carries out the decision about that epoch, and trains the next one. Its reward is that of
    `config.reward`, not normalised. An action that is illegal changes nothing, earns nothing, and
    is counted in `info["illegal"]`. The episode ends after `config.max_epochs`, or early, with
    `governor.rollback_penalty` less, where the losses went bad and `train.on_bad_numbers` or
    `rl.on_finding` ends it. `info` of the last step has what came of it under "result".

    Episodes have the seeds seed, seed + 1000, ..., from `config.seed` or from that of `reset`.
    Raises `ValueError` for a config that cannot run.
    """

    def __init__(self, config: RunConfig, *, task: Task | None = None) -> None:
        if config.distributed.strategy != "none":
            raise ValueError(
                "an environment trains its host in one process, got distributed.strategy "
                f"{config.distributed.strategy!r}; leave it out"
            )
        self.config = config
        self.task = shared(task or get_task(config.task, config.task_config()), config)
        model = prepare(config, "heuristic", task=self.task).model
        blueprints = model.registry.names(model.host.topology)
        slots = [slot.state.slot for slot in model.slots]
        self.table = ActionTable(slots, blueprints, config.rl.blends)
        self.observer = Observer(slots, blueprints, config.growth)
        ranges = self.observer.ranges()
        self.observation_space = spaces.Box(
            numpy.array([low for _, low, _ in ranges], numpy.float32),
            numpy.array([high for _, _, high in ranges], numpy.float32),
        )
        self.action_space = spaces.Discrete(len(self.table))
        self.signals: Signals | None = None
        """The measurements of the last epoch; None outside of an episode."""
        self._first_seed = config.seed
        self._begun = 0  # episodes
        self._costs: dict[tuple[str, str | None, str], float] = {}
        self._run: EpisodeRun | None = None
        self._actions: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with its first epoch. `BadNumbersError` if its losses are bad
        already."""
        super().reset(seed=seed)
        return driven(self.resetting(seed=seed))

    def step(self, action: Any) -> Step:
        """One epoch. `RuntimeError` without an episode that is under way, `ValueError` for what is
        no action."""
        return driven(self.stepping(action))

    def resetting(self, *, seed: int | None = None) -> Work[tuple[Observation, dict[str, Any]]]:
        """`reset` as a generator that pauses wherever the device has to be waited for."""
        if seed is not None:
            self._first_seed = seed
            self._begun = 0
        self.close()
        config = replace(self.config, seed=self._first_seed + SEED_STEP * self._begun, episodes=1)
        self._begun += 1
        self._episode = prepare(config, "heuristic", task=self.task)
        self._episode.cost.known = self._costs
        self._run = EpisodeRun(self._episode).__enter__()
        self._actions = []
        self._illegal = 0
        self._return = 0.0
        self._started = time.perf_counter()
        _, ended = yield from self._advance(self._run)
        if ended:
            self.close()
            raise BadNumbersError(
                f"the losses of the first epoch went bad with seed {config.seed}; try a smaller "
                "learning rate, or train.grad.clip_norm"
            )
        return self._observation(), {"seed": config.seed}

    def stepping(self, action: Any) -> Work[Step]:
        """`step` as a generator that pauses wherever the device has to be waited for. An action
        that is refused is refused at once."""
        if self._run is None:
            raise RuntimeError("there is no episode under way; call reset before step")
        return self._stepping(self._run, self._place(action))

    def _stepping(self, run: EpisodeRun, place: int) -> Work[Step]:
        self._actions.append(place)
        random = self._episode.random
        refused = len(self._episode.refused)
        result = None
        try:
            with random.active():
                reward = run.apply(self.table.decisions[place])
            more, ended = yield from self._advance(run)
        except BadNumbersError:
            reward = more = 0.0
            ended = True
        if ended:
            more -= self.config.governor.rollback_penalty
        elif run.over:
            with random.active():
                test = run.launch_test()
            measured = yield test
            result = run.finish(measured)
        illegal = len(self._episode.refused) > refused
        self._illegal += illegal
        reward = _finite(reward + more, self._episode)
        self._return += reward
        info: dict[str, Any] = {"illegal": self._illegal, "refused": illegal}
        over = ended or run.over
        if over:
            info |= self._closing(result)
            self.close()
        return self._last, reward, over, False, info

    def action_masks(self) -> Mask:
        """Whether each action would be carried out now: bool [actions]."""
        if self.signals is None:
            raise RuntimeError("there is no episode under way; call reset before action_masks")
        return numpy.array(self.table.mask(self.signals, self.config.growth))

    def close(self) -> None:
        """End the episode that is under way, if any."""
        if self._run is not None:
            self._run.__exit__(None, None, None)
        self._run = self.signals = None

    def state_dict(self) -> dict[str, Any]:
        """The state of the environment as plain values: the seed of its episode and the actions so
        far, from which `load_state_dict` trains it again."""
        return {
            "first_seed": self._first_seed,
            "begun": self._begun,
            "under_way": self._run is not None,
            "actions": list(self._actions),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Repeat the episode of a state, action by action."""
        self.close()
        self._first_seed = state["first_seed"]
        self._begun = state["begun"]
        if state["under_way"]:
            self._begun -= 1
            self.reset()
            for action in state["actions"]:
                self.step(action)

    def _place(self, action: Any) -> int:
        number = numpy.asarray(action)
        if number.shape or number.dtype.kind not in "iu" or not 0 <= number < len(self.table):
            raise ValueError(f"expected an action in [0, {len(self.table)}), got {action!r}")
        return int(number)

    def _advance(self, run: EpisodeRun) -> Work[tuple[float, bool]]:
        """Train up to the next decision. Gives what epochs that were undone earned, and whether a
        finding ends the episode."""
        earned = 0.0
        random = self._episode.random
        stops = self.config.rl.on_finding == "end" or self.config.train.on_bad_numbers == "stop"
        while not run.over:
            with random.active():
                epoch = run.launch()
            measured = yield epoch
            with random.active():
                signals = run.observe(measured)
            if run.finding is not None and stops:
                return earned, True
            if signals is not None:
                self.signals = signals
                self._last = self._observation()
                break
            earned += self._episode.decided[-1][1]
        return earned, False

    def _observation(self) -> Observation:
        assert self.signals is not None
        return numpy.array(self.observer(self.signals), numpy.float32)

    def _closing(self, result: EpisodeResult | None) -> dict[str, Any]:
        """The report of the last step; "episode" is in the form that Stable-Baselines3 expects."""
        seconds = time.perf_counter() - self._started
        episode = {"r": self._return, "l": len(self._actions), "t": seconds}
        if result is None:
            return {"episode": episode}
        found = {
            "accuracy": result.test.points,
            "parameters": result.parameters,
            "fossils": result.fossils,
            "cost": result.cost,
        }
        return {"episode": episode | found, "result": found}


class FactoredActions(gymnasium.ActionWrapper[Observation, Any, Any]):
    """The same environment with actions (slot, blueprint, blend, operation), as a `MultiDiscrete`.

    WAIT is (any, any, any, WAIT). Masks are one after another, factor by factor: a value is legal
    if some legal action has it. So a combination may still be illegal, and is a counted no-op.
    """

    def __init__(self, env: MorphogenesisEnv) -> None:
        super().__init__(env)
        table = env.table
        self._table = table
        self._factors = (table.slots, table.blueprints, table.blends, tuple(Op))
        self.action_space = spaces.MultiDiscrete([len(values) for values in self._factors])

    def action(self, action: Any) -> Any:
        """The place of the action in the table."""
        slot, blueprint, blend, op = (
            values[int(place)] for values, place in zip(self._factors, action, strict=True)
        )
        decision = Decision(op=op, slot=slot, blueprint=blueprint, blend=blend)  # type: ignore[arg-type]
        return numpy.int64(self._table.place(decision))

    def action_masks(self) -> Mask:
        """bool [slots + blueprints + blends + operations]."""
        legal = self.env.get_wrapper_attr("action_masks")()
        chosen = [d for d, allowed in zip(self._table.decisions, legal, strict=True) if allowed]
        acting = [decision for decision in chosen if decision.op is not Op.WAIT]
        masks: list[bool] = []
        for name, values in zip(("slot", "blueprint", "blend"), self._factors, strict=False):
            there = {getattr(decision, name) for decision in acting} - {None}
            masks += [value in there or not there for value in values]
        masks += [op in {decision.op for decision in chosen} for op in Op]
        return numpy.array(masks)


def _finite(reward: float, episode: Episode) -> float:
    if not math.isfinite(reward):
        raise ValueError(
            f"the reward {episode.config.reward!r} of epoch {episode.epoch} is {reward}; with "
            "train.on_bad_numbers 'stop' such an epoch ends the episode"
        )
    return reward
