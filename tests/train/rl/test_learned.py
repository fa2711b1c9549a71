"""Saved policies: what Stable-Baselines3 would do, in any run, and files that are no policies."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from esper_train import EventType, HostConfig, RunConfig, TelemetryHub, run_heuristic_episode
from esper_train.control.policy import Op
from esper_train.rl.env import MorphogenesisEnv
from esper_train.rl.learned import (
    PolicySpaces,
    SavedPolicy,
    actor_weights,
    load_policy,
    probabilities,
)
from tests.helpers.episodes import SHORT
from tests.helpers.scripted import EASY, Recorder

CONFIG = replace(SHORT, growth=EASY, max_epochs=5, max_batches=2)


def spaces_of(env: MorphogenesisEnv) -> PolicySpaces:
    return PolicySpaces(
        slots=env.table.slots,
        blueprints=env.table.blueprints,
        blends=env.table.blends,
        observation=tuple(name for name, _, _ in env.observer.ranges()),
        actions=env.table.names(),
    )


def made(config: RunConfig = CONFIG, seed: int = 0) -> tuple[Any, SavedPolicy, MorphogenesisEnv]:
    """An untrained policy of Stable-Baselines3, with weights that make it decided."""
    env = MorphogenesisEnv(config)
    torch.manual_seed(seed)
    policy = MaskableActorCriticPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 1e-3,
        net_arch={"pi": [16, 16], "vf": [16, 16]},
    )
    with torch.no_grad():
        policy.action_net.weight.mul_(300)
    return policy, SavedPolicy(spaces_of(env), actor_weights(policy.state_dict())), env


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.pt"


def test_probabilities_and_choices_are_those_of_stable_baselines3(path: Path) -> None:
    policy, saved, env = made()
    saved.save(path)
    assert path.stat().st_size < 100 * 1024
    learned = load_policy(path).for_model(_model(CONFIG))
    observation, _ = env.reset()
    for _ in range(5):
        mask = env.action_masks()
        assert env.signals is not None
        decision = learned.decide(env.signals)
        with torch.no_grad():
            theirs = policy.get_distribution(
                torch.as_tensor(observation)[None], action_masks=mask
            ).distribution.probs[0]
        assert decision.probabilities is not None
        found = dict(zip(env.table.names(), theirs.tolist(), strict=True))
        legal = {name for name, allowed in zip(env.table.names(), mask, strict=True) if allowed}
        assert decision.probabilities.keys() == legal
        for name in legal:
            assert decision.probabilities[name] == pytest.approx(found[name], rel=1e-4, abs=1e-6)
        action, _ = policy.predict(observation, action_masks=mask, deterministic=True)
        assert env.table.place(decision) == int(action)
        assert decision.confidence == max(decision.probabilities.values())
        observation, _, over, _, _ = env.step(action)
    assert over


def _model(config: RunConfig) -> Any:
    from esper_train.run.build import build_episode

    return build_episode(config, slots=config.slots).model


def test_a_policy_decides_in_a_run_as_in_the_environment(path: Path) -> None:
    _, saved, env = made(seed=3)
    saved.save(path)
    recorder = Recorder()
    run = run_heuristic_episode(
        CONFIG, policy=load_policy(path).for_model, hub=TelemetryHub([recorder])
    )
    learned = saved.for_model(_model(CONFIG))
    env.reset()
    rewards = []
    while env.signals is not None:
        rewards.append(env.step(env.table.place(learned.decide(env.signals)))[1])
    assert rewards == list(run.rewards)
    assert run.action_counts[Op.WAIT.name] < 5  # it decided something
    assert run.refused == ()
    line = recorder.of(EventType.EPOCH)[0]
    assert sum(line.data["decision"]["probabilities"].values()) == pytest.approx(1.0)
    json.loads(line.to_json())


def test_a_policy_draws_by_its_probabilities_and_by_its_seed() -> None:
    _, saved, env = made()
    env.reset()
    assert env.signals is not None
    model = _model(CONFIG)
    found = []
    for seed in range(300):
        policy = saved.for_model(model, seed=seed)
        decision = policy.decide(env.signals)
        assert decision.probabilities is not None
        found.append(env.table.names()[env.table.place(decision)])
        policy.reset()
        assert policy.decide(env.signals) == decision
    for name, share in decision.probabilities.items():
        assert found.count(name) / 300 == pytest.approx(share, abs=0.1)
    state = policy.state_dict()
    expected = [policy.decide(env.signals) for _ in range(5)]
    again = saved.for_model(model, seed=299)
    again.load_state_dict(state)
    assert [again.decide(env.signals) for _ in range(5)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": ("early",)}, "trained for slots early, mid, late, and this run has early"),
        ({"host": HostConfig(depth=2), "slots": ("early", "mid")}, "trained for slots"),
        (
            {"task": "synthetic-lm"},
            "trained for blueprints conv_expand, .* and this run has mlp, attention, lora, norm",
        ),
    ],
)
def test_a_policy_of_other_spaces_is_refused_before_the_run(
    change: dict[str, Any], message: str
) -> None:
    _, saved, _ = made()
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        run_heuristic_episode(
            replace(CONFIG, **change), policy=saved.for_model, hub=TelemetryHub([recorder])
        )
    assert recorder.events == []


class Hostile:
    """An object that would run code if it were unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.flag,)


def spoil(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)


def about(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda found: found.update(about=json.dumps({**json.loads(found["about"]), **changes}))


def weight(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["weights"].update({name: change(found["weights"][name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format=9), "expected format 1, got 9"),
        (lambda found: found.pop("about"), "expected format, about and weights"),
        (lambda found: found.update(about="{"), "cannot be used as a policy"),
        (lambda found: found.update(about=3), "its spaces are damaged"),
        (about(slots="early"), "its spaces are damaged: .*'slots' takes a list"),
        (about(secret=1), "unknown config key 'secret'"),
        (about(actions=["wait"]), "of another version"),
        (about(observation=[]), "of another version"),
        (about(blends=["slow"]), "unknown blend 'slow'"),
        (lambda found: found["weights"].pop("action_net.bias"), "expected the weights"),
        (weight("action_net.bias", lambda w: w[1:]), "expected action_net with 25 rows"),
        (weight("action_net.weight", lambda w: w.double()), "as a float32 tensor"),
        (weight("action_net.weight", lambda w: w * float("nan")), "NaN or infinite"),
        (weight("mlp_extractor.policy_net.0.weight", lambda w: w[:, 1:]), "rows of 95 weights"),
        (weight("mlp_extractor.policy_net.0.bias", lambda w: w.sum()), "cannot be used"),
    ],
)
def test_a_damaged_file_is_refused(
    path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    made()[1].save(path)
    spoil(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert "name a file that `esper-train ppo` wrote" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_file_runs_nothing(path: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    path.write_bytes(pickle.dumps(Hostile(flag)))
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        load_policy(path)
    torch.save({"format": 1, "about": "{}", "weights": Hostile(flag)}, path)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        load_policy(path)
    assert not flag.exists()


@pytest.mark.parametrize("data", [b"", b"no policy", b"PK\x03\x04"])
def test_other_files_are_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be used as a policy"):
        load_policy(path)
    with pytest.raises(FileNotFoundError):
        load_policy(path.with_name("missing.pt"))


def test_a_file_cut_short_is_refused(path: Path) -> None:
    made()[1].save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be used as a policy"):
        load_policy(path)


def test_a_file_larger_than_any_policy_is_not_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="more than any policy"):
        load_policy(path)


def test_probabilities_are_over_legal_actions() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    expected = numpy.exp([1.0, 2.0]) / numpy.exp([1.0, 2.0]).sum()
    found = probabilities(logits, [True, False, True])
    assert found == pytest.approx([expected[0], 0.0, expected[1]])
    with pytest.raises(ValueError, match="no action is legal"):
        probabilities(logits, [False] * 3)
    with pytest.raises(ValueError, match="not finite"):
        probabilities(logits * float("nan"), [True] * 3)
