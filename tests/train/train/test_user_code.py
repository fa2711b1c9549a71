"""Where a user's own criterion, loader, modules or optimizer meets the loop."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from esper_kernels import KernelConfig, Meter
from esper_train import (
    CompileConfig,
    GovernorConfig,
    GradConfig,
    HeuristicConfig,
    NonFiniteLossError,
    OptimConfig,
    OptimizerRegistry,
    RunConfig,
    TrainConfig,
    build_train_step,
    evaluate,
    get_task,
    run_fit,
    train_one_epoch,
)
from esper_train.base.device import plain_defaults
from esper_train.base.settings import from_dict
from esper_train.tasks import load_splits
from esper_train.train.data import Loader
from esper_train.train.optimizers import make_schedule

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


def test_stop_raises_where_only_a_gradient_is_not_finite() -> None:
    model = linear()
    model.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFiniteLossError, match="12 gradient entries were NaN"):
        train(model, [(INPUTS, TARGETS)])


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
def test_accumulated_gradients_are_those_of_all_valid_rows(
    weight: Tensor | None, bad: list[int], shape: str
) -> None:
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


class Subtracts(nn.Module):
    """A model that writes over its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, alpha: object = None) -> Tensor:
        x -= 3
        return self.linear(x)


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_model_that_writes_over_its_input_leaves_the_data_alone(
    shuffled: bool, workers: int
) -> None:
    inputs = INPUTS.clone()
    targets = TARGETS.clone()
    shuffle = torch.Generator().manual_seed(0) if shuffled else None
    loader = Loader((inputs, targets), 4, shuffle=shuffle, workers=workers)
    losses = [
        evaluate(Subtracts(), loader, TrainConfig(), task_type="classification").loss
        for _ in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(inputs, INPUTS)
    assert losses[0] == pytest.approx(F.cross_entropy(Subtracts()(INPUTS.clone()), TARGETS).item())


def test_a_loss_that_writes_over_the_targets_leaves_the_data_alone() -> None:
    targets = TARGETS.clone()

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels.clone())
        labels.zero_()
        return loss

    train(linear(), Loader((INPUTS, targets), 4), criterion=criterion)
    assert torch.equal(targets, TARGETS)


def test_every_variant_is_measured_on_the_same_inputs() -> None:
    variants = {"one": {"slot": 0.0}, "two": {"slot": 1.0}}
    result = evaluate(
        Subtracts(),
        [(INPUTS.clone(), TARGETS)],
        TrainConfig(),
        task_type="classification",
        variants=variants,
    )
    assert {measured.loss for measured in result.variants.values()} == {result.loss}


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


def without_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
    """A compiler whose backward fails, and only when it is needed."""

    def forward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        def fails(*arguments: Tensor) -> object:
            raise RuntimeError("no backward here")

        return make_boxed_func(fails)

    return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=backward)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_failing_compiler_of_the_backward_pass_is_a_failure_like_any_other(
    accumulate: int,
) -> None:
    torch._dynamo.reset()
    batches = [(INPUTS, TARGETS), (INPUTS + 1, TARGETS), (INPUTS[:5], TARGETS[:5])]
    config = TrainConfig(
        accumulate=accumulate,
        compile=CompileConfig(enabled=True, backend=without_backward, on_failure="eager"),
    )
    ours = Normed()
    ours.drop.eval()
    plain = copy.deepcopy(ours)
    result = train(ours, batches, config)
    expected = train(plain, batches, TrainConfig(accumulate=accumulate))
    assert "no backward here" in (result.compile_failure or "")
    assert not result.compiled
    assert (result.loss, result.correct, result.valid) == (
        expected.loss,
        expected.correct,
        expected.valid,
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="no backward here"):
        train(
            Normed(),
            batches,
            TrainConfig(compile=CompileConfig(enabled=True, backend=without_backward)),
        )


def test_what_eager_fails_at_too_is_raised_and_is_no_failure_of_the_compiler() -> None:
    torch._dynamo.reset()
    config = TrainConfig(compile=CompileConfig(enabled=True, backend="eager", on_failure="eager"))
    step = build_train_step("classification", config)
    with pytest.raises(IndexError):
        train(linear(), [(INPUTS, TARGETS + 5)], config, step=step)
    assert step.compile_failure is None


def test_an_unknown_compiler_is_refused_by_name() -> None:
    config = TrainConfig(compile=CompileConfig(enabled=True, backend="inductr"))
    with pytest.raises(ValueError, match="perhaps 'inductor'"):
        build_train_step("classification", config)


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("amp", [None, "float16", "bfloat16"])
def test_defaults_of_the_process_change_nothing(amp: str | None) -> None:
    config = from_dict(RunConfig, {"task": "synthetic", "max_epochs": 1, "max_batches": 2})
    config = replace(config, train=from_dict(TrainConfig, {"amp": {"dtype": amp}}))
    result = run_fit(config)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert result.test.valid > 0


@pytest.mark.parametrize("name", ["digits", "synthetic", "synthetic-lm"])
def test_tasks_give_the_same_data_under_other_defaults(
    name: str, request: pytest.FixtureRequest
) -> None:
    expected = load_splits(get_task(name)).train
    request.getfixturevalue("other_defaults")
    with plain_defaults():
        found = load_splits(get_task(name)).train
    assert torch.get_default_dtype() is torch.float64
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert np.array_equal(mine.numpy(), theirs.numpy())


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
@pytest.mark.parametrize("each", ["step", "epoch"])
@pytest.mark.parametrize("longer", [7, 4, 3])
def test_a_schedule_follows_the_length_of_a_resumed_run(kind: str, each: str, longer: int) -> None:
    """After 3 of 5 epochs the run is resumed with another length."""
    config = from_dict(OptimConfig, {"schedule": {"kind": kind, "each": each, "final": 0.1}})
    per_epoch = 2 if each == "step" else 1

    def rates(length: int) -> tuple[OptimizerRegistry, list[float]]:
        optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
        schedule = make_schedule(optimizer, config.schedule, length * per_epoch)
        registry = OptimizerRegistry(schedule_each=each)
        registry.attach("host", optimizer, schedule)
        seen = []
        for _ in range(length * per_epoch):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            registry.advance(each)
        return registry, seen

    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    resumed = OptimizerRegistry(schedule_each=each)
    resumed.attach("host", optimizer, make_schedule(optimizer, config.schedule, 5 * per_epoch))
    for _ in range(3 * per_epoch):
        optimizer.step()
        resumed.advance(each)
    resumed.load_state_dict(resumed.state_dict())
    resumed.fit_schedules(config.schedule, (longer - 3) * per_epoch)
    seen = []
    for _ in range((longer - 3) * per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        resumed.advance(each)
    _, expected = rates(longer)
    assert seen == pytest.approx(expected[3 * per_epoch :], rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GradConfig(vanishing=math.nan),
            r"train\.grad\.vanishing must be at least 0 and finite, got nan",
        ),
        (
            lambda: HeuristicConfig(plateau_threshold=math.nan),
            "plateau_threshold must be a finite number, got nan",
        ),
        (lambda: GovernorConfig(sensitivity=math.nan), "sensitivity must be at least 0"),
        (lambda: OptimConfig(host_lr=math.nan), "host_lr must be positive and finite"),
    ],
)
def test_nan_is_no_setting(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RunConfig(optim={"host_lr": 0.1}),
            "optim takes OptimConfig, got {'host_lr': 0.1}",
        ),
        (lambda: RunConfig(max_epochs="60"), "max_epochs takes int, got '60'"),
        (lambda: RunConfig(batch_size=8.0), r"batch_size takes int, got 8\.0"),
        (lambda: RunConfig(max_epochs=True), "max_epochs takes int, got True"),
        (lambda: RunConfig(slots="early"), "slots takes a tuple of str, got 'early'"),
        (lambda: RunConfig(slots=("early", 2)), "slots takes a tuple of str"),
        (lambda: TrainConfig(topk=(1, 2.5)), "topk takes a tuple of int"),
        (lambda: TrainConfig(kernel="cpp"), "kernel takes KernelConfig, got 'cpp'"),
        (lambda: CompileConfig(backend=3), "backend takes str or a callable, got 3"),
        (lambda: OptimConfig(host_lr="0.1"), "host_lr takes float, got '0.1'"),
    ],
)
def test_settings_of_another_type_are_refused_when_they_are_made(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make()
