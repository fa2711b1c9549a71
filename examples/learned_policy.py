"""A controller that was learned: train it by PPO for a moment, then let it grow a network.

pip install 'esper-kernels[train,rl]'
python examples/learned_policy.py

A policy that is any good takes longer: docs/rl.md.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from esper_train import RunConfig, run_heuristic_episode
from esper_train.rl import train_ppo
from esper_train.rl.config import RLConfig
from esper_train.rl.learned import load_policy


def main() -> None:
    learning = RLConfig(hosts=2, steps=64, rollout=16, batch=16, evaluate_every=0, evaluations=1)
    config = RunConfig(task="synthetic", max_epochs=8, max_batches=4, rl=learning)
    with tempfile.TemporaryDirectory() as out:
        train_ppo(config, Path(out) / "ppo", say=print)
        policy = load_policy(Path(out) / "ppo" / "policy.pt")
    unseen = replace(config, seed=12345)
    result = run_heuristic_episode(unseen, policy=policy.maker(unseen))
    print(f"decisions: {result.action_counts}, test accuracy {result.test.accuracy:.1%}")


if __name__ == "__main__":
    main()
