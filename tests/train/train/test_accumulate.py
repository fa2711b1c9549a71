"""Several batches per step: the gradient equals that of one batch with all their rows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels.testing import SyncCounter
from esper_train import AmpConfig, GradConfig, TrainConfig, train_one_epoch
from esper_train.base.settings import from_dict
from tests.helpers.linear import INPUTS, TARGETS, linear, sgd, train

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def batches(sizes: tuple[int, ...] = (8, 3, 6, 8, 2)) -> list[tuple[Tensor, Tensor]]:
    """Every third target is ignored, and one batch has nothing else."""
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(n, 6, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]
    for _, targets in made:
        targets[::3] = -100
    made[2][1][:] = -100
    return made


@pytest.mark.parametrize(
    "criterion",
    [
        None,
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [2, 3, 9])
def test_a_step_of_several_batches_is_that_of_one_of_all_their_rows(
    criterion: nn.CrossEntropyLoss | None, accumulate: int
) -> None:
    ours = classifier()
    plain = classifier()
    data = batches()
    if criterion is not None and criterion.ignore_index == 2:
        for _, targets in data:
            targets.clamp_(min=0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, plain)]
    config = TrainConfig(accumulate=accumulate)
    result = train_one_epoch(
        ours, data, optimizers[0], config, task_type="classification", criterion=criterion
    )
    for i in range(0, len(data), accumulate):
        inputs, targets = (
            torch.cat(parts) for parts in zip(*data[i : i + accumulate], strict=True)
        )
        optimizers[1].zero_grad()
        (criterion or nn.CrossEntropyLoss())(plain(inputs), targets).backward()
        optimizers[1].step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.batches == len(data)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_of_fewer_bits_weigh_as_much(dtype: torch.dtype) -> None:
    """Class 156 is -100 in uint8, and is not ignored."""
    ends = []
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(n, 6, generator=generator), torch.full((n,), 156)) for n in (4, 2)]
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        model = nn.Linear(6, 200)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        converted = [(x, y.to(kind)) for x, y in data]
        train_one_epoch(
            model, converted, optimizer, TrainConfig(accumulate=2), task_type="classification"
        )
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[1], ends[0])


def test_another_criterion_weighs_the_batches_alike() -> None:
    def squared(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - F.one_hot(targets.clamp(min=0), 5)).square().mean()

    ours = classifier()
    plain = classifier()
    data = batches()[:2]
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    config = TrainConfig(accumulate=2)
    train_one_epoch(ours, data, optimizer, config, task_type="classification", criterion=squared)
    (sum(squared(plain(x), y) for x, y in data) / 2).backward()  # type: ignore[union-attr]
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a, b - b.grad)


@pytest.mark.parametrize("amp", [AmpConfig(), AmpConfig(dtype="float16")])
def test_statistics_clipping_and_schedules_go_by_the_step(amp: AmpConfig) -> None:
    steps: list[float] = []

    class Watch(torch.optim.SGD):
        def step(self, *arguments: Any) -> Any:
            grads = [p.grad.double().norm() for group in self.param_groups for p in group["params"]]
            steps.append(float(torch.stack(grads).norm()))
            return super().step(*arguments)

    model = classifier()
    config = TrainConfig(accumulate=2, grad=GradConfig(clip_norm=1e-3), amp=amp)
    optimizer = Watch(model.parameters(), lr=0.1, fused=True)
    train_one_epoch(model, batches(), optimizer, config, task_type="classification")
    assert len(steps) == 3
    scale = 1.0 if amp.dtype is None else amp.init_scale
    assert steps == pytest.approx([1e-3 * scale] * 3, rel=1e-2)


def test_groups_of_batches_sync_once_an_epoch() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SyncCounter() as counter:
        train_one_epoch(
            model, batches(), optimizer, TrainConfig(accumulate=2), task_type="classification"
        )
    assert counter.count == 1


def test_a_bad_target_in_a_weighted_group_is_refused_by_name() -> None:
    model = classifier()
    data = batches()
    data[1][1][1] = 7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(IndexError, match=r"target 7"):
        train_one_epoch(
            model,
            data,
            optimizer,
            TrainConfig(accumulate=3),
            task_type="classification",
            criterion=nn.CrossEntropyLoss(weight=WEIGHT),
        )


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


ALL_IGNORED = torch.full((6,), -100)


@pytest.mark.parametrize(
    ("targets", "criterion", "policy"),
    [
        (torch.tensor([0, -100, 1, 99, 1, 0]), None, "warn"),
        (torch.cat([ALL_IGNORED[:3], TARGETS[3:]]), None, "stop"),
        (TARGETS, nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0])), "stop"),
        (TARGETS, nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.2), "stop"),
    ],
    ids=["ignored and bad", "a batch of ignored rows", "a class of weight 0", "an ignored class"],
)
def test_a_step_over_ragged_batches_divides_by_what_counts(
    targets: Tensor, criterion: nn.CrossEntropyLoss | None, policy: str
) -> None:
    ours, plain = linear(), linear()
    parts = [(INPUTS[:3], targets[:3]), (INPUTS[3:4], targets[3:4]), (INPUTS[4:], targets[4:])]
    config = from_dict(TrainConfig, {"accumulate": 3, "on_bad_numbers": policy})
    train(ours, parts, config, criterion=criterion)
    valid = (targets == -100) | (targets < 3)
    loss = (criterion or nn.CrossEntropyLoss())(plain(INPUTS[valid]), targets[valid])
    optimizer = sgd(plain)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)
