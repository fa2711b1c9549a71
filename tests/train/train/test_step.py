"""The step of one batch: task types, criteria, and where the gradient of the logits is written."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import Meter
from esper_train import TrainConfig, build_train_step, evaluate, train_one_epoch

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([0, 2, -100, 1, 1, 0])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    "criterion",
    [
        None,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0])),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), ignore_index=0, label_smoothing=0.1),
    ],
    ids=str,
)
def test_cross_entropy_criterion_gives_torchs_gradient(
    criterion: nn.CrossEntropyLoss | None,
) -> None:
    ours = linear()
    plain = linear()
    targets = (
        TARGETS if criterion is None or criterion.ignore_index == -100 else TARGETS.clamp(min=0)
    )
    step = build_train_step("classification", TrainConfig(), criterion)
    step(ours, INPUTS, targets, Meter("cpu"))
    (criterion or nn.CrossEntropyLoss())(plain(INPUTS), targets).backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_any_other_criterion_runs_eagerly_and_says_so() -> None:
    def focal(logits: Tensor, targets: Tensor) -> Tensor:
        chance = logits.softmax(1).gather(1, targets[:, None]).squeeze(1)
        return (-((1 - chance) ** 2) * chance.log()).mean()

    ours = linear()
    plain = linear()
    targets = TARGETS.clamp(min=0)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    result = train_one_epoch(
        ours,
        [(INPUTS, targets)],
        optimizer,
        TrainConfig(),
        task_type="classification",
        criterion=focal,
    )
    loss = focal(plain(INPUTS), targets)
    loss.backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.correct[1] == int((plain(INPUTS).argmax(1) == targets).sum())
    assert result.backend == "eager criterion"
    again = evaluate(
        ours, [(INPUTS, targets)], TrainConfig(), task_type="classification", criterion=focal
    )
    assert again.loss == pytest.approx(loss.item(), rel=1e-6)


def test_criterion_without_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        build_train_step("classification", TrainConfig(), nn.CrossEntropyLoss(reduction="none"))


def test_unknown_task_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'classifcation'.*'classification'"):
        build_train_step("classifcation", TrainConfig())


def test_logits_of_another_rank_are_refused() -> None:
    step = build_train_step("lm", TrainConfig())
    with pytest.raises(ValueError, match=r"'lm' expects logits \[N, T, V\], got \(6, 3\)"):
        step(linear(), INPUTS, TARGETS, Meter("cpu"))


def test_logits_and_meter_on_different_devices_are_refused() -> None:
    """The audited loop added counts on one device to an accumulator on another."""
    step = build_train_step("classification", TrainConfig())
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        step(linear(), INPUTS, TARGETS, Meter("meta"))


class SavesItsOutput(torch.autograd.Function):
    """exp, kept where autograd's version counter does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.y


class Made(nn.Module):
    """Logits [N, ..., 3] as `make` makes them of inputs [N, 4], a weight [4, 3] and an offset [6,
    3]."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.offset = nn.Parameter(torch.randn(6, 3, generator=generator))
        self.logits: list[int] = []  # addresses: whoever kept the tensors would change the choice
        self.gradients: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.make(inputs, self.weight, self.offset)
        if logits.requires_grad:
            logits.register_hook(lambda g: self.gradients.append(g.data_ptr()))
        self.logits.append(logits.data_ptr())
        return logits


@pytest.mark.parametrize(
    ("where", "make"),
    [
        ("logits", lambda x, w, b: x @ w),
        ("logits", lambda x, w, b: F.linear(x, w.t(), b[0])),
        ("logits", lambda x, w, b: torch.addmm(b, x, w)),
        ("logits", lambda x, w, b: torch.bmm(x.view(2, 3, 4), w.expand(2, 4, 3))),
        ("logits", lambda x, w, b: F.linear(x.view(2, 3, 4), w.t(), b[0])),  # a view of a product
        ("logits", lambda x, w, b: F.linear(x.view(2, 3, 4), w.t())),
        ("kept", lambda x, w, b: (x @ w).relu()),  # needs its result
        ("kept", lambda x, w, b: (x @ w).add_(b).sigmoid()),
        ("kept", lambda x, w, b: F.log_softmax(x @ w, -1)),
        ("kept", lambda x, w, b: SavesItsOutput.apply(x @ w)),
        ("kept", lambda x, w, b: SavesItsOutput.apply(x @ w).view(2, 3, 3)),
        ("logits", lambda x, w, b: x @ w + b),  # hands the gradient itself on, to a parameter
        ("fresh", lambda x, w, b: b.view(2, 3, 3)),  # the parameter's gradient is a view of ours
        ("logits", lambda x, w, b: (w.t() @ x.t()).t()),  # classes apart
    ],
)
def test_memory_of_the_gradient_never_changes_what_is_learned(
    where: str, make: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """The gradient is written over the logits, into memory kept for the next batch, or into fresh
    memory; gradients add up over two batches."""
    ours = Made(make)
    plain = Made(make)
    dims = make(INPUTS, ours.weight, ours.offset).dim()
    step = build_train_step("classification" if dims == 2 else "lm", TrainConfig())
    for inputs in (INPUTS, INPUTS.flip(0) + 1):
        step(ours, inputs, TARGETS.view(2, 3) if dims == 3 else TARGETS, Meter("cpu"))
        F.cross_entropy(plain(inputs).flatten(0, -2), TARGETS).backward()
    for mine, torchs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad)
    over = [g == x for g, x in zip(ours.gradients, ours.logits, strict=True)]
    assert over == [where == "logits"] * 2
    if where == "kept":
        assert ours.gradients[0] == ours.gradients[1]


class Keeps(nn.Module):
    """A linear model with a hook on its output, as `keep` says."""

    def __init__(self, keep: Callable[[Tensor, list[Tensor]], None], rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.kept: list[Tensor] = []
        self.rank = rank
        self.linear.register_forward_hook(lambda m, inputs, out: keep(out, self.kept))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(2, 3, 4) if self.rank == 3 else x)


class Viewed(Keeps):
    """A model whose output is a view of what the hook saw."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(6, 3)


def retain_grad(out: Tensor, kept: list[Tensor]) -> None:
    out.retain_grad()
    kept.append(out)


KEEPERS = {
    "the output": lambda out, kept: kept.append(out),
    "its detach": lambda out, kept: kept.append(out.detach()),
    "a view": lambda out, kept: kept.append(out[..., :1]),
    "an array of numpy": lambda out, kept: kept.append(torch.from_numpy(out.detach().numpy())),
    "retain_grad": retain_grad,
}


@pytest.mark.parametrize("model_type", [Keeps, Viewed, lambda keep: Keeps(keep, rank=3)])
@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_logits_that_somebody_keeps_are_not_written_over(
    keep: Callable[[Tensor, list[Tensor]], None], model_type: Callable[..., Keeps]
) -> None:
    model = model_type(keep)
    step = build_train_step("lm" if model.rank == 3 else "classification", TrainConfig())
    targets = TARGETS.view(2, 3) if model.rank == 3 else TARGETS
    step(model, INPUTS, targets, Meter("cpu"))
    (kept,) = model.kept
    with torch.no_grad():
        expected = F.linear(INPUTS, model.linear.weight, model.linear.bias)
    torch.testing.assert_close(kept.detach().reshape(6, -1), expected[:, : kept.shape[-1]])


def test_a_gradient_hook_that_reads_the_logits_sees_logits() -> None:
    """A hook that masks the gradient by the size of the logits trains the same network as plain
    torch."""

    def mask(out: Tensor, kept: list[Tensor]) -> None:
        values = out.detach()
        out.register_hook(lambda g: g * (values.abs() < 0.5))

    ours = Keeps(mask)
    plain = Keeps(mask)
    build_train_step("classification", TrainConfig())(ours, INPUTS, TARGETS, Meter("cpu"))
    F.cross_entropy(plain(INPUTS), TARGETS).backward()
    for mine, torchs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad)


@pytest.mark.parametrize("make", [lambda out: out.relu(), lambda out: out.tanh(), lambda out: out])
def test_gradients_that_a_hook_keeps_stay_what_they_were(make: Callable[[Tensor], Tensor]) -> None:
    """Each step writes where no earlier gradient that somebody still holds lies."""
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def note(gradient: Tensor) -> None:
        kept.append(gradient)
        copies.append(gradient.clone())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = make(self.linear(x))
            out.register_hook(note)
            return out

    model = Model()
    step = build_train_step("classification", TrainConfig())
    for shift in range(4):
        step(model, INPUTS + shift, TARGETS, Meter("cpu"))
    assert len(kept) == 4
    for mine, then in zip(kept, copies, strict=True):
        assert torch.equal(mine, then)


@pytest.mark.parametrize(
    "last",
    [nn.Identity, nn.Tanh, lambda: nn.LogSoftmax(-1)],
    ids=["product", "tanh", "log-softmax"],
)
@pytest.mark.parametrize("packed", [lambda x: x, lambda x: x.detach(), lambda x: x.clone()])
def test_what_autograd_saved_through_hooks_is_not_written_over(
    last: Callable[[], nn.Module], packed: Callable[[Tensor], Tensor]
) -> None:
    """The model's saved tensors live where the hooks put them; its gradients are plain torch's."""
    ours = nn.Sequential(linear(), last())
    plain = copy.deepcopy(ours)
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
        build_train_step("classification", TrainConfig())(ours, INPUTS, TARGETS, Meter("cpu"))
    F.cross_entropy(plain(INPUTS), TARGETS).backward()
    for mine, torchs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad)


def test_a_model_that_needs_no_gradient_is_refused() -> None:
    model = linear().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze a parameter"):
        build_train_step("classification", TrainConfig())(model, INPUTS, TARGETS, Meter("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_on_the_gpu_and_meter_on_the_cpu_are_refused() -> None:
    step = build_train_step("classification", TrainConfig())
    with pytest.raises(ValueError, match=r"cuda.*cpu"):
        step(linear().cuda(), INPUTS.cuda(), TARGETS.cuda(), Meter("cpu"))
