"""A policy that was learned: its file, and the controller that it is in any run.

The file holds a state dict, and JSON of its spaces and of how it was trained; no code is run from
it. Neither needs more than torch.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper_train.base.settings import from_dict
from esper_train.base.state import PlainState
from esper_train.config import RunConfig
from esper_train.control.policy import Decision
from esper_train.control.signals import Signals
from esper_train.morph.config import GrowthConfig
from esper_train.morph.model import MorphModel
from esper_train.rl.actions import ActionTable, drawn
from esper_train.rl.observation import Observer
from esper_train.run.directory import write_file
from esper_train.run.run import PolicyMaker

FORMAT = 1
"""Version of the layout of the file."""
LARGEST = 64 * 2**20
"""Bytes of a file that is read at all."""
LAYERS = ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net")
"""The actor's layers, as Stable-Baselines3 names them; tanh stands between them."""


@dataclass(frozen=True, kw_only=True)
class PolicySpaces:
    """The slots, blueprints, observations and actions that a policy knows, and the runs in which it
    was trained."""

    slots: tuple[str, ...]
    blueprints: tuple[str, ...]
    blends: tuple[str, ...]
    observation: tuple[str, ...]
    actions: tuple[str, ...]
    task: str = ""
    reward: str = ""
    max_epochs: int = 0
    steps: int = 0


@dataclass(frozen=True)
class SavedPolicy:
    """The contents of a policy file."""

    spaces: PolicySpaces
    weights: Mapping[str, Tensor] = field(repr=False)

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        write_file(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The contents of the file."""
        buffer = io.BytesIO()
        about = json.dumps(asdict(self.spaces))
        torch.save({"format": FORMAT, "about": about, "weights": dict(self.weights)}, buffer)
        return buffer.getvalue()

    def maker(self, config: RunConfig) -> PolicyMaker:
        """A function that makes the controller of a run of `config`."""
        seed = config.seed if config.rl.choose == "sample" else None
        return partial(self.for_model, seed=seed)

    def for_model(self, model: MorphModel, seed: int | None = None) -> "LearnedPolicy":
        """The controller of a run with this network, which draws its actions by `seed`, or takes
        the most probable ones without. `ValueError` if it was trained for other networks."""
        spaces = self.spaces
        growth = model.slots[0].growth
        slots = tuple(slot.state.slot for slot in model.slots)
        blueprints = model.registry.names(model.host.topology)
        for what, trained, found in (
            ("slots", spaces.slots, slots),
            ("blueprints", spaces.blueprints, blueprints),
        ):
            if trained != found:
                raise ValueError(
                    f"the policy was trained for {what} {', '.join(trained)}, and this run has "
                    f"{', '.join(found)}; choose the same {what}, or train a policy for these"
                )
        return LearnedPolicy(self, growth, seed)


def load_policy(path: Path) -> SavedPolicy:
    """Read a policy file. Raises `ValueError` if it is damaged, of another version, or no policy,
    and `OSError` if it cannot be read."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than any policy; name a policy file")
    data = io.BytesIO(path.read_bytes())
    try:
        return _checked(torch.load(data, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler fails in many ways on what is not its own
        why = error if isinstance(error, ValueError) else "it is more than tensors and plain values"
        raise ValueError(
            f"{path} cannot be used as a policy: {why}; name a file that `esper-train ppo` wrote"
        ) from error


def _checked(found: Any) -> SavedPolicy:
    if not isinstance(found, dict) or found.keys() != {"format", "about", "weights"}:
        raise ValueError("expected format, about and weights")
    if found["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {found['format']!r}")
    try:
        spaces = from_dict(PolicySpaces, json.loads(found["about"]))
    except TypeError as error:
        raise ValueError(f"its spaces are damaged: {error}") from error
    table = ActionTable(spaces.slots, spaces.blueprints, spaces.blends)
    observer = Observer(spaces.slots, spaces.blueprints, GrowthConfig())
    fields = tuple(name for name, _, _ in observer.ranges())
    if (spaces.actions, spaces.observation) != (table.names(), fields):
        raise ValueError("its observations or actions are those of another version")
    _check_weights(found["weights"], len(fields), len(table))
    return SavedPolicy(spaces, found["weights"])


def _check_weights(weights: Any, inputs: int, outputs: int) -> None:
    """`ValueError` unless these are the layers from as many inputs to as many outputs."""
    names = {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    if not isinstance(weights, dict) or weights.keys() != names:
        raise ValueError(f"expected the weights {', '.join(sorted(names))}")
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.is_sparse:
            raise ValueError(f"expected {name} as a float32 tensor")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values")
    size = inputs
    for layer in LAYERS:
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        rows = outputs if layer == LAYERS[-1] else len(bias)
        if bias.shape != (rows,) or weight.shape != (rows, size):
            raise ValueError(
                f"expected {layer} with {rows} rows of {size} weights, got {tuple(weight.shape)} "
                f"and a bias of {tuple(bias.shape)}"
            )
        size = rows


def actor_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The actor's part of a policy of Stable-Baselines3, copied."""
    return {
        f"{layer}.{kind}": state_dict[f"{layer}.{kind}"].detach().cpu().clone()
        for layer in LAYERS
        for kind in ("weight", "bias")
    }


def probabilities(logits: Tensor, mask: Sequence[bool]) -> list[float]:
    """The distribution over the legal actions; `ValueError` if none is legal, or a logit of one is
    not finite. logits: float32 [actions]."""
    legal = torch.tensor(mask, device="cpu")
    if not bool(legal.any()):
        raise ValueError("no action is legal; WAIT has to be, so the mask is wrong")
    if not bool(logits[legal].isfinite().all()):
        raise ValueError("the policy's logits are not finite; train it again")
    found: list[float] = logits.masked_fill(~legal, -torch.inf).softmax(0).tolist()
    return found


class LearnedPolicy(PlainState):
    """A learned controller: each epoch it draws one of the legal actions by its probabilities, or
    takes the most probable one if `seed` is None."""

    STATE = ("_drawn",)

    def __init__(self, saved: SavedPolicy, growth: GrowthConfig, seed: int | None) -> None:
        spaces = saved.spaces
        self._table = ActionTable(spaces.slots, spaces.blueprints, spaces.blends)
        self._observer = Observer(spaces.slots, spaces.blueprints, growth)
        self._growth = growth
        self._seed = seed
        self._layers = [
            (saved.weights[f"{layer}.weight"], saved.weights[f"{layer}.bias"]) for layer in LAYERS
        ]
        self._names = self._table.names()
        self.reset()

    def reset(self) -> None:
        """Begin the random numbers anew."""
        self._drawn = 0

    def logits(self, observation: Sequence[float]) -> Tensor:
        """The actor's output for an observation: float32 [actions]."""
        x = torch.tensor(observation, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            *hidden, (weight, bias) = self._layers
            for w, b in hidden:
                x = torch.tanh(nn.functional.linear(x, w, b))
            return nn.functional.linear(x, weight, bias)

    def decide(self, signals: Signals) -> Decision:
        mask = self._table.mask(signals, self._growth)
        shares = probabilities(self.logits(self._observer(signals)), mask)
        if self._seed is None:
            place = max(range(len(shares)), key=shares.__getitem__)
        else:
            place = drawn(shares, self._seed, self._drawn)
            self._drawn += 1
        named = zip(self._names, shares, mask, strict=True)
        return replace(
            self._table.decisions[place],
            confidence=shares[place],
            probabilities={name: share for name, share, legal in named if legal},
        )
