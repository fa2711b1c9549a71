"""What users hand to a run: policies, sinks, registries, optimizers, targets that their criterion
ignores, and hosts that keep a state besides tensors."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper_train import (
    Decision,
    Host,
    HostConfig,
    Idle,
    Op,
    Signals,
    Splits,
    TelemetryHub,
    load_run,
    run_fit,
    run_heuristic_episode,
)
from tests.helpers import own
from tests.helpers.growing_run import reported
from tests.helpers.own import CONFIG
from tests.helpers.scripted import Script, StopAfter, germinate

SEATED = {"e1": germinate("early", "doubled")}


class Counting(nn.Module):
    """A layer whose state has a plain number besides its tensors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.layer(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def counting_host(config: HostConfig) -> Host:
    segments = {"early": Counting(own.COLUMNS, 12), "mid": nn.Linear(12, 12)}
    return Host("features", segments, nn.Linear(12, own.CLASSES), dict.fromkeys(segments, 12))


@pytest.mark.usefixtures("without_pictures")
def test_a_host_with_a_state_besides_tensors_is_resumed_during_a_trial(tmp_path: Path) -> None:
    task = replace(own.table, build_host=counting_host)
    rollback = replace(CONFIG.train, on_bad_numbers="rollback")
    config = replace(CONFIG, max_epochs=6, train=rollback)
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_heuristic_episode(config, task=task, policy=Script(**SEATED), out=whole, baseline=False)
    hub = TelemetryHub([StopAfter(5)])
    with pytest.raises(KeyboardInterrupt):
        run_heuristic_episode(config, task=task, policy=Script(**SEATED), hub=hub, out=part)
    policy = Script(**SEATED)
    result = run_heuristic_episode(
        config, task=task, policy=policy, out=part, resume=True, baseline=False
    )
    (seen,) = policy.seen
    assert seen.slots[0].stage.name == "BLENDING"
    assert reported(part) == reported(whole)
    assert result.model.host.segments["early"].calls == 6 * 4  # four batches per epoch
    loaded: Any = load_run(part, task=task)
    assert loaded.host.segments["early"].calls == 6 * 4


class Answers(Idle):
    """A controller that always decides the same."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def decide(self, signals: Signals) -> Decision:
        return self.answer  # type: ignore[no-any-return]


class OnlyDecides:
    def decide(self, signals: Signals) -> Decision:
        return Decision(op=Op.WAIT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": Answers(None)}, r"what Answers decides must be of type Decision, got None; to"),
        ({"policy": Answers("wait")}, r"of type Decision, got 'wait'; to do nothing, return"),
        ({"policy": OnlyDecides()}, "without reset, state_dict, load_state_dict; write them, or"),
        ({"policy": lambda model: None}, "expected a policy with the methods decide, .* got None"),
        ({"hub": [print]}, r"hub must be of type TelemetryHub or None, .*; pass TelemetryHub"),
        ({"registry": {}}, "registry must be of type BlueprintRegistry or None, got {}"),
    ],
)
def test_what_is_of_another_kind_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        run_heuristic_episode(CONFIG, task=own.table, **arguments)


def test_a_sink_without_its_methods_is_refused_before_the_first_event() -> None:
    with pytest.raises(TypeError, match=r"a sink has the methods write\(event\) and close\(\)"):
        TelemetryHub([print])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"op": 1, "slot": "early"}, TypeError, "op must be of type Op, got 1; pass one of Op.WAI"),
        ({"op": Op.CULL}, ValueError, "to CULL needs a slot, got None; pass slot="),
        ({"op": Op.GERMINATE, "slot": "early"}, ValueError, "to GERMINATE needs a blueprint"),
    ],
)
def test_a_decision_says_what_it_lacks(
    values: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Decision(**values)


def test_an_optimizer_that_holds_none_of_its_parameters_is_refused() -> None:
    def of_others(parameters: Sequence[nn.Parameter], lr: float, group: str) -> torch.optim.SGD:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)

    with pytest.raises(ValueError, match=r"for group 'host', got one that holds none of the 6;"):
        run_fit(CONFIG, task=replace(own.table, make_optimizer=of_others))


class Cast(nn.Module):
    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("slot", ["early", "mid"])
def test_a_seed_has_the_dtype_of_the_segment_before_it(slot: str) -> None:
    def mixed(config: HostConfig) -> Host:
        segments = {
            "early": Cast(nn.Linear(own.COLUMNS, 12), torch.bfloat16),
            "mid": Cast(nn.Linear(12, 12), torch.float32),
        }
        return Host("features", segments, nn.Linear(12, own.CLASSES), dict.fromkeys(segments, 12))

    policy = Script(e1=germinate(slot, "doubled"))
    config = replace(CONFIG, max_epochs=5, keep="last")
    model = run_heuristic_episode(
        config, task=replace(own.table, build_host=mixed), policy=policy
    ).model
    assert policy.seen[-1].slots[slot == "mid"].stage.name == "BLENDING"
    found = {p.dtype for p in model.get_seed_parameters(slot)}
    assert found == {torch.bfloat16 if slot == "early" else torch.float32}


def test_a_host_without_parameters_is_refused() -> None:
    def fixed(config: HostConfig) -> Host:
        return Host("features", {"early": nn.Tanh()}, nn.Identity(), {"early": own.COLUMNS})

    with pytest.raises(ValueError, match="expected a host with parameters, got one without"):
        run_fit(CONFIG, task=replace(own.table, build_host=fixed))


@pytest.mark.parametrize("kind", [lambda *pair: pair, TensorDataset])
def test_targets_that_the_criterion_ignores_are_no_bad_ones(kind: Callable[..., Any]) -> None:
    """255 marks the unknown in many data sets. Four of the 32 rows are marked so."""

    def load() -> Splits:
        splits = own.load_table()
        inputs, targets = splits.train  # type: ignore[misc]
        marked = torch.where(torch.arange(32) < 4, 255, targets).to(torch.uint8)
        return replace(splits, train=kind(inputs, marked))

    task = replace(own.table, load=load, criterion=nn.CrossEntropyLoss(ignore_index=255))
    valid: list[int] = []

    class Counts(StopAfter):
        def write(self, event: Any) -> None:
            if event.type.value == "epoch":
                valid.append(event.data["train"]["valid"])

    run_fit(replace(CONFIG, max_epochs=1), task=task, hub=TelemetryHub([Counts(9)]))
    assert valid == [28]


def test_a_grown_network_can_be_pickled() -> None:
    """With all blueprints of the package, which its registry holds, and a seed of one of them."""
    task = replace(own.table, blueprints=())
    policy = Script(e1=germinate("early", "norm"))
    model = run_heuristic_episode(replace(CONFIG, keep="last"), task=task, policy=policy).model
    again = pickle.loads(pickle.dumps(model))
    assert again.has_active_seed_in_slot("early")
    inputs = own.load_table().test[0]  # type: ignore[index]
    assert torch.equal(again.eval()(inputs), model.eval()(inputs))
