"""Criteria and steps of the user's own: what runs unchanged, and what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import CrossEntropyLoss, KernelConfig, LinearCrossEntropyLoss, Meter
from esper_kernels.testing import plain_torch_cross_entropy
from esper_train import TrainConfig, build_train_step, evaluate, train_one_epoch
from esper_train.base.settings import from_dict
from tests.helpers.linear import INPUTS, TARGETS, linear, train


class Focal(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        chance = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        return -((1 - chance.exp()) ** 2 * chance).mean()


class Renamed(nn.CrossEntropyLoss):
    """A subclass that computes the same, which cannot be known."""


def patched() -> nn.CrossEntropyLoss:
    criterion = nn.CrossEntropyLoss()
    criterion.forward = lambda logits, targets: F.cross_entropy(logits, targets) * 3  # type: ignore[method-assign]
    return criterion


def hooked() -> nn.CrossEntropyLoss:
    criterion = nn.CrossEntropyLoss()
    criterion.register_forward_hook(lambda module, inputs, loss: loss * 3)
    return criterion


@pytest.mark.parametrize(
    "criterion",
    [Focal(), Renamed(), patched(), hooked()],
    ids=["focal", "renamed", "patched", "hooked"],
)
def test_a_criterion_that_is_not_exactly_cross_entropy_runs_as_it_is(criterion: nn.Module) -> None:
    ours = linear()
    plain = linear()
    step = build_train_step("classification", TrainConfig(), criterion)
    step(ours, INPUTS, TARGETS, Meter("cpu"))
    criterion(plain(INPUTS), TARGETS).backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert step.backend(torch.device("cpu")) == "eager criterion"


@pytest.mark.parametrize("policy", ["stop", "warn", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.bool])
def test_targets_of_another_dtype_are_refused_under_every_policy(
    policy: str, dtype: torch.dtype
) -> None:
    config = from_dict(TrainConfig, {"on_bad_numbers": policy})
    model = linear()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match="targets"):
        train_one_epoch(
            model,
            [(INPUTS, TARGETS.to(dtype))],
            torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
            config,
            task_type="classification",
        )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_step_built_for_something_else_is_refused() -> None:
    model = linear()
    step = build_train_step("classification", TrainConfig())
    eager = TrainConfig(kernel=KernelConfig(backend="eager"))
    batches = [(INPUTS, TARGETS)]
    with pytest.raises(ValueError, match=r"config\.kernel"):
        train(model, batches, eager, step=step)
    with pytest.raises(ValueError, match="criterion"):
        train(model, batches, step=step, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="task_type"):
        evaluate(model, batches, TrainConfig(), task_type="lm", step=step)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    own = build_train_step("classification", TrainConfig(), criterion)
    train(model, batches, step=own)  # what is left out is the step's own
    train(model, batches, step=own, criterion=criterion)


class Eager(torch.optim.SGD):
    """A third-party optimizer with a setting called fused that ignores found_inf."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, lr=0.1)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["fused"] = True

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad


def test_an_optimizer_that_cannot_skip_is_refused_whatever_its_settings_are_called() -> None:
    model = linear()
    with pytest.raises(ValueError, match="fused=True"):
        train_one_epoch(
            model,
            [(INPUTS * math.nan, TARGETS)],
            Eager(model.parameters()),
            TrainConfig(on_bad_numbers="skip"),
            task_type="classification",
        )
    assert model.weight.isfinite().all()


def test_the_backend_that_served_is_named() -> None:
    model = linear().double()
    result = train(model, [(INPUTS.double(), TARGETS)])
    assert result.backend == "eager"
    assert (
        evaluate(
            model, [(INPUTS.double(), TARGETS)], TrainConfig(), task_type="classification"
        ).backend
        == "eager"
    )


@pytest.mark.parametrize("task_type", ["classification", "lm", "dense"])
def test_the_module_of_the_kernels_runs_as_the_fused_step(task_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "weight": torch.linspace(0.5, 2.0, 7),
        "ignore_index": 2,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
        "softcap": 4.0,
    }
    shape = {"classification": (6, 7), "lm": (3, 5, 7), "dense": (3, 7, 5)}[task_type]
    model = nn.Conv1d(7, 7, 1) if task_type == "dense" else nn.Linear(7, 7)
    inputs = torch.randn(shape, generator=generator)
    class_dim = 1 if task_type == "dense" else -1
    targets = torch.randint(7, shape[:-1] if class_dim == -1 else (3, 5), generator=generator)
    meter = Meter("cpu")
    step = build_train_step(task_type, TrainConfig(), CrossEntropyLoss(**options))
    step(model, inputs, targets, meter)
    found = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    logits = model(inputs).double().movedim(class_dim, -1)
    loss = plain_torch_cross_entropy(logits, targets, **options)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    assert meter.compute().loss == pytest.approx(loss.item(), rel=1e-5)
    assert step.backend(torch.device("cpu")) == "cpp"


class OurSubclass(CrossEntropyLoss):
    """A subclass, of which nobody can know what it computes."""


def test_a_subclass_of_the_module_runs_as_it_is() -> None:
    model = linear()
    step = build_train_step("classification", TrainConfig(), OurSubclass(z_loss=0.1))
    step(model, INPUTS, TARGETS, Meter("cpu"))
    assert step.backend(torch.device("cpu")) == "eager criterion"


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (CrossEntropyLoss(reduction="none"), "reduction 'mean' or 'sum'"),
        (CrossEntropyLoss(meter=Meter("cpu")), "without a meter and config"),
        (CrossEntropyLoss(config=KernelConfig()), "without a meter and config"),
        (LinearCrossEntropyLoss(4, 3), "no criterion for logits.*train.linear_loss"),
    ],
    ids=["none", "meter", "config", "linear"],
)
def test_modules_that_do_not_fit_the_loop_are_refused(criterion: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_train_step("classification", TrainConfig(), criterion)


@pytest.mark.parametrize("more", [{"z_loss": 0.1}, {"softcap": 5.0}])
def test_soft_targets_with_what_torch_has_not_are_refused(more: dict[str, float]) -> None:
    model = linear()
    step = build_train_step("classification", TrainConfig(), CrossEntropyLoss(**more))
    shares = torch.full((len(INPUTS), 3), 1 / 3)
    with pytest.raises(ValueError, match="no z_loss or softcap"):
        step(model, INPUTS, shares, Meter("cpu"))
