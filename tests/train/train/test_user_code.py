"""Where a user's own criterion, loader, modules or optimizer meets the loop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import KernelConfig, Meter
from esper_train import NonFiniteLossError, TrainConfig, build_train_step, evaluate, train_one_epoch
from esper_train.base.settings import from_dict

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 2, 1, 1, 1, 0])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]


def train(model: nn.Module, batches: object, config: TrainConfig | None = None, **options: object):  # type: ignore[no-untyped-def]
    return train_one_epoch(
        model,
        batches,  # type: ignore[arg-type]
        sgd(model),
        config or TrainConfig(),
        task_type="classification",
        **options,  # type: ignore[arg-type]
    )


class Focal(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        chance = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        return -((1 - chance.exp()) ** 2 * chance).mean()


class Renamed(nn.CrossEntropyLoss):
    """A subclass that computes the same: nobody can know."""


def patched() -> nn.CrossEntropyLoss:
    criterion = nn.CrossEntropyLoss()
    criterion.forward = lambda logits, targets: F.cross_entropy(logits, targets) * 3  # type: ignore[method-assign]
    return criterion


def hooked() -> nn.CrossEntropyLoss:
    criterion = nn.CrossEntropyLoss()
    criterion.register_forward_hook(lambda module, inputs, loss: loss * 3)
    return criterion


@pytest.mark.parametrize(
    "criterion", [Focal(), Renamed(), patched(), hooked()], ids=["focal", "renamed", "patched", "hooked"]
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
def test_targets_of_another_dtype_are_refused_under_every_policy(policy: str, dtype: torch.dtype) -> None:
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
    """An optimizer of somebody else's with a setting called fused, which knows no found_inf."""

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


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (None, "got None"),
        (INPUTS, "got a Tensor"),
        ((INPUTS, TARGETS, TARGETS), r"got a tuple \(Tensor, Tensor, Tensor\)"),
        ((INPUTS, None), r"got a tuple \(Tensor, NoneType\)"),
        ({"x": INPUTS}, "got a dict"),
    ],
)
def test_a_batch_that_is_none_does_not_end_the_epoch(batch: object, named: str) -> None:
    good = (INPUTS, TARGETS)
    for run in (train, lambda *a: evaluate(*a, TrainConfig(), task_type="classification")):
        with pytest.raises(TypeError, match=named):
            run(linear(), [good, batch, good])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))


@pytest.mark.parametrize("frozen", [("norm",), ("drop",), ("norm", "drop", "out"), ()])
def test_modules_in_eval_mode_stay_in_it(frozen: tuple[str, ...]) -> None:
    model = Normed()
    for name in frozen:
        getattr(model, name).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    train(model, [(INPUTS + 5, TARGETS)])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.norm.running_mean, torch.zeros(4)) == ("norm" in frozen)  # type: ignore[arg-type]
    evaluate(model, [(INPUTS, TARGETS)], TrainConfig(), task_type="classification")
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_are_restored_when_measuring_fails() -> None:
    model = Normed()
    model.norm.eval()
    with pytest.raises(TypeError):
        evaluate(model, [None], TrainConfig(), task_type="classification")  # type: ignore[list-item]
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)


def test_a_model_in_eval_mode_is_trained_in_training_mode() -> None:
    model = Normed().eval()
    train(model, [(INPUTS + 5, TARGETS)])
    assert model.training
    assert not torch.equal(model.norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stop_raises_without_a_run_and_brings_the_result(bad: float) -> None:
    with pytest.raises(NonFiniteLossError, match="training loss is nan") as raised:
        train(linear(), [(INPUTS, TARGETS), (INPUTS * bad, TARGETS)])
    result = raised.value.result
    assert (result.batches, result.valid, result.nonfinite) == (2, 12, 6)


def test_an_epoch_without_a_valid_row_is_no_bad_number() -> None:
    result = train(linear(), [(INPUTS, torch.full_like(TARGETS, -100))])
    assert result.valid == 0
    assert math.isnan(result.loss)


def test_only_a_run_can_roll_back() -> None:
    with pytest.raises(ValueError, match="needs a run"):
        train(linear(), [(INPUTS, TARGETS)], TrainConfig(on_bad_numbers="rollback"))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("bad", [[], [0, 3], [6, 7, 8, 9, 10, 11], [1, 11]])
@pytest.mark.parametrize("shape", ["rows", "tokens"])
def test_accumulated_gradients_are_those_of_all_valid_rows(weight: Tensor | None, bad: list[int], shape: str) -> None:
    """Rows with a target outside the classes count for nothing, as ignored ones do."""
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))
    targets[4] = -100
    wrong = targets.clone()
    wrong[bad] = 7
    valid = targets.clone()
    valid[bad] = -100
    ours = linear()
    plain = linear()
    config = TrainConfig(accumulate=2, on_bad_numbers="warn")
    criterion = nn.CrossEntropyLoss(weight=weight)
    tokens = shape == "tokens"
    batches = [
        (x.view(2, -1, 4) if tokens else x, t.view(2, -1) if tokens else t)
        for x, t in zip(inputs.split((4, 8)), wrong.split((4, 8)), strict=True)
    ]
    task = "lm" if tokens else "classification"
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    result = train_one_epoch(ours, batches, optimizer, config, task_type=task, criterion=criterion)
    F.cross_entropy(plain(inputs), valid, weight=weight).backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert result.bad_targets == len(bad)
