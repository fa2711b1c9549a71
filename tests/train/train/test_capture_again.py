"""Steps are captured again exactly when something that a graph holds has changed."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, Optimizer

from esper_train import (
    GradConfig,
    OptimizerRegistry,
    TrainConfig,
    build_train_step,
    train_one_epoch,
)
from esper_train.train.batches import Batches
from esper_train.train.capture import WARM_UP, WARMING_UP, Capture, Work
from tests.helpers.taped import (
    MODES,
    RATE,
    Tape,
    adamw,
    assert_same,
    captured,
    data,
    everything,
    network,
    registry,
    sgd,
)


def _reload(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _half_momentum(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


def _new_rate(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = RATE / 8


def _freeze(model: nn.Module, optimizer: Optimizer) -> None:
    next(model.parameters()).requires_grad_(False)


def _move(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def _replace_buffer(model: nn.Module, optimizer: Optimizer) -> None:
    norm = model.get_submodule("2")
    norm.register_buffer("running_mean", torch.ones(8))


CHANGES: dict[str, tuple[Callable[[nn.Module, Optimizer], Any], bool]] = {
    "nothing": (lambda model, optimizer: None, False),
    "learning rate": (_new_rate, False),
    "weights loaded in place": (
        lambda model, optimizer: model.load_state_dict(network().state_dict()),
        False,
    ),
    "measuring mode": (lambda model, optimizer: model.eval(), False),
    "optimizer's state loaded": (_reload, True),
    "momentum": (_half_momentum, True),
    "gradients dropped": (lambda model, optimizer: optimizer.zero_grad(), True),
    "frozen weights": (_freeze, True),
    "moved weights": (_move, True),
    "another buffer": (_replace_buffer, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_captured_again_when_what_it_holds_has_changed(change: str) -> None:
    between, again = CHANGES[change]
    found = []
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        optimizer = sgd(*model.parameters())
        step, tape = (
            captured(config) if capture else (build_train_step("classification", config), None)
        )
        for epoch in range(3):
            if epoch == 1:
                between(model, optimizer)
            result = train_one_epoch(
                model,
                data(*[8] * 6, seed=epoch),
                optimizer,
                config,
                task_type="classification",
                step=step,
            )
            assert result.not_replayed == (
                {WARMING_UP: 3} if capture and (epoch == 0 or (epoch, again) == (1, 1)) else {}
            )
        assert tape is None or tape.records == 1 + again
        found.append(everything(model, OptimizerRegistry(host=optimizer)))
    assert_same(*found)


class Addresses(Tape):
    """A graph that keeps no tensor alive, like one of CUDA."""

    def record(self, work: Work) -> Work:
        work()
        return lambda: None


def test_memory_that_a_graph_uses_is_not_given_to_others() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step = build_train_step("classification", config)
    optimizer = sgd(*model.parameters())
    step.capture = Capture(Addresses())

    def epoch(batches: Batches) -> None:
        train_one_epoch(model, batches, optimizer, config, task_type="classification", step=step)

    def watching() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(*[8] * 5)
        gc.collect()
        freed.extend(ref.expired() for ref in used)

    freed: list[bool] = []
    epoch(data(*[8] * 5))
    used = [
        StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None
    ]
    optimizer.zero_grad()
    gc.collect()
    assert len(used) == 6
    assert not any(ref.expired() for ref in used)
    epoch(watching())  # captured again
    assert freed == [True] * 6


def test_an_optimizer_is_capturable_while_it_is_captured_and_no_longer() -> None:
    """torch's AdamW asks for it on a GPU, and warns of it in other steps."""
    config = TrainConfig(capture=True)
    model = network()
    seen = []
    step = captured(config)[0]
    optimizer = adamw(*model.parameters())
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(o.param_groups[0]["capturable"])
    )
    train_one_epoch(
        model, data(*[8] * 6, 3), optimizer, config, task_type="classification", step=step
    )
    assert seen == [False] * WARM_UP + [True, False]
    assert optimizer.param_groups[0]["capturable"] is False


def test_another_config_or_model_or_list_of_optimizers_is_another_step() -> None:
    config = TrainConfig(capture=True)
    model = network()
    other = network()
    clipped = replace(config, grad=GradConfig(clip_norm=1.0))
    step, tape = captured(config)
    optimizers = registry(model, sgd)
    others = OptimizerRegistry(host=sgd(*other.parameters()))
    around = nn.Sequential(model, nn.Softmax(1))  # another network with the same weights
    uses = [
        (model, optimizers, config),
        (model, optimizers, clipped),
        (around, optimizers, clipped),
        (other, others, config),
    ]
    for records, (net, opt, how) in enumerate(uses, start=1):
        for _ in range(2):
            train_one_epoch(net, data(*[8] * 5), opt, how, task_type="classification", step=step)
            assert tape.records == records
    last = [
        OptimizerRegistry(whole=others.present()[0]),  # another name in the statistics
        OptimizerRegistry(part=sgd(*list(other.parameters())[2:])),
        OptimizerRegistry(part=SGD(list(other.parameters())[2:], lr=RATE, fused=True)),
        OptimizerRegistry(part=SGD(list(other.parameters())[2:], lr=0.0, fused=True)),
    ]
    for records, opt in enumerate(last, start=5):
        before = copy.deepcopy(list(other.parameters()))
        result = train_one_epoch(
            other, data(*[8] * 5), opt, config, task_type="classification", step=step
        )
        assert tape.records == records
        assert result.grad is not None
        assert set(result.grad.groups) == set(opt.parameters())
    assert_same(list(other.parameters()), before)
