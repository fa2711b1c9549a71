"""A controller that learns: an environment over the loop of every run, and PPO.

The environment and PPO need the extra `rl`, and load it when they are first used; a policy that was
saved runs beside torch alone.
"""

import importlib
import importlib.util
from typing import Any

PLACES = {
    "MorphogenesisEnv": "esper_train.rl.env",
    "FactoredActions": "esper_train.rl.env",
    "MorphogenesisVectorEnv": "esper_train.rl.vector",
    "make_vector": "esper_train.rl.vector",
    "train_ppo": "esper_train.rl.ppo",
}
"""Public names, and the modules that have them."""
PACKAGES = ("gymnasium", "stable_baselines3", "sb3_contrib")

__all__ = [
    "FactoredActions",
    "MorphogenesisEnv",
    "MorphogenesisVectorEnv",
    "make_vector",
    "train_ppo",
]


def require_packages() -> None:
    """`ImportError` that says how to install them, where packages of the extra are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"learning a controller needs {', '.join(missing)}: pip install 'esper-kernels[rl]'"
        )


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_packages()
    return getattr(importlib.import_module(PLACES[name]), name)
