"""Parts of a task of one's own: criterion, optimizers, augmentation, batches, and any host."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_train import (
    Blueprint,
    EventType,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Splits,
    TelemetryHub,
    run_fit,
    run_heuristic_episode,
)
from esper_train.morph.blueprints import Residual
from tests.helpers import own
from tests.helpers.own import CONFIG
from tests.helpers.scripted import Recorder, Script, germinate

SPLITS = ("train", "validation", "test")


def test_each_part_of_the_network_gets_the_tasks_own_optimizer() -> None:
    made: list[tuple[str, float, int]] = []

    def make(parameters: Sequence[nn.Parameter], lr: float, group: str) -> torch.optim.Optimizer:
        made.append((group, lr, len(parameters)))
        return torch.optim.Adagrad(parameters, lr=lr)

    task = replace(own.table, make_optimizer=make)
    optim = OptimConfig(host_lr=0.05, seed_lr=0.02)
    policy = Script(e1=germinate("early", "bottleneck"))
    run_heuristic_episode(replace(CONFIG, optim=optim), task=task, policy=policy)
    assert made == [("host", 0.05, 6), ("early", 0.02, 6)]
    wrong = replace(own.table, make_optimizer=lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="return a torch Optimizer for group 'host', got NoneType"):
        run_fit(CONFIG, task=wrong)


def test_a_criterion_of_ones_own_is_what_is_learned() -> None:
    """The first epoch's loss is the criterion's mean over the batches, by torch."""
    seen: list[Tensor] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.multi_margin_loss(logits, targets)
        if loss.requires_grad:
            seen.append(loss.detach())
        return loss

    recorder = Recorder()
    run_fit(
        replace(CONFIG, max_epochs=1),
        task=replace(own.table, criterion=criterion),
        hub=TelemetryHub([recorder]),
    )
    (epoch,) = recorder.of(EventType.EPOCH)
    assert len(seen) == 4
    assert epoch.data["train"]["loss"] == pytest.approx(float(torch.stack(seen).mean()))


def test_an_nn_cross_entropy_is_fused() -> None:
    recorder = Recorder()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = replace(own.table, criterion=criterion)
    run_fit(replace(CONFIG, max_epochs=1), task=task, hub=TelemetryHub([recorder]))
    assert "criterion" not in recorder.of(EventType.RUN_STARTED)[0].data["backend"]


class Focal(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 0.1 * super().forward(input, target)


@pytest.mark.parametrize("criterion", [nn.MultiMarginLoss(), Focal()], ids=str)
def test_the_loss_reward_needs_a_loss_of_guessing(criterion: nn.Module) -> None:
    task = replace(own.table, criterion=criterion)
    with pytest.raises(ValueError, match="not known for a criterion of one's own; use 'shaped'"):
        run_fit(replace(CONFIG, reward="loss"), task=task)


def test_training_batches_are_augmented_and_no_others() -> None:
    seen: list[int] = []

    def flip(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(inputs))
        return -inputs, targets

    task = replace(own.table, augment=flip)
    flipped = run_fit(replace(CONFIG, max_epochs=1), task=task)
    assert seen == [8, 8, 8, 8]
    splits = own.load_table()
    inputs, targets = own.load_table().train  # type: ignore[misc]
    by_hand = replace(own.table, load=lambda: replace(splits, train=(-inputs, targets)))
    expected = run_fit(replace(CONFIG, max_epochs=1), task=by_hand)
    assert flipped.accuracy == expected.accuracy
    assert flipped.test.loss == expected.test.loss


def named(splits: Splits) -> Splits:
    """The same batches as dicts with names of their own."""

    def batches(split: Any) -> list[dict[str, Tensor]]:
        parts = (part.split(8) for part in split)
        return [{"row": x, "kind": t} for x, t in zip(*parts, strict=True)]

    return Splits(**{name: batches(getattr(splits, name)) for name in SPLITS})


def test_any_batch_is_read_by_the_tasks_own_function() -> None:
    """The run equals one on the same batches as pairs."""
    config = replace(CONFIG, evaluation_batch=8)
    pairs = replace(own.load_table(), train=list(own_batches(own.load_table().train)))
    plain = run_fit(config, task=replace(own.table, load=lambda: pairs))
    task = replace(
        own.table,
        load=lambda: named(own.load_table()),
        batch=lambda batch: (batch["row"], batch["kind"]),
    )
    result = run_fit(config, task=task)
    assert result.test.loss == plain.test.loss
    assert result.accuracy == plain.accuracy
    grown = run_heuristic_episode(config, task=task, policy=Script(e1=germinate("early", "norm")))
    assert grown.action_counts["GERMINATE"] == 1
    words = r"segment 'early' of the host fails on row: shape \[2, 6\], kind: shape \[2\]: TypeErr"
    with pytest.raises(ValueError, match=words):
        run_fit(config, task=replace(task, batch=lambda batch: (batch, batch["kind"])))


def own_batches(split: Any) -> Any:
    inputs, targets = split
    return zip(inputs.split(8), targets.split(8), strict=True)


def test_a_forward_of_ones_own_trains_the_host_alone() -> None:
    def halved(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs / 2)

    task = replace(own.table, forward=halved)
    with pytest.raises(ValueError, match="write it into the host's segments, or train the host al"):
        run_heuristic_episode(CONFIG, task=task)
    splits = own.load_table()
    halves = {n: (getattr(splits, n)[0] / 2, getattr(splits, n)[1]) for n in SPLITS}
    expected = run_fit(CONFIG, task=replace(own.table, load=lambda: Splits(**halves)))
    assert run_fit(CONFIG, task=task).test.loss == expected.test.loss


def test_a_regression_trains_its_host_alone() -> None:
    def load() -> Splits:
        inputs, _ = own.table_data()
        data = inputs, inputs[:, :3].sum(1, keepdim=True).expand(-1, 3).contiguous()
        return Splits(train=data, validation=data, test=data)

    task = replace(
        own.table,
        task_type="regression",
        num_classes=None,
        load=load,
        criterion=nn.MSELoss(),
    )
    config = replace(CONFIG, max_epochs=20, optim=OptimConfig(host_lr=0.05), keep="best")
    result = run_fit(config, task=task)
    assert result.test.loss < 1.0 < float(load().train[1].var())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"judged by accuracy.*run_fit"):
        run_heuristic_episode(CONFIG, task=task)


@pytest.mark.parametrize("blueprint", ["bottleneck", "gated", "norm", "doubled"])
def test_a_perceptron_grows(blueprint: str) -> None:
    config = replace(CONFIG, max_epochs=12)
    policy = Script(e1=germinate("early", blueprint))
    result = run_heuristic_episode(config, task=own.table, policy=policy)
    assert result.model.slot("early").state.stage.name == "PROBATIONARY"
    assert result.action_counts["GERMINATE"] == 1
    assert not result.refused


def test_a_residual_network_grows() -> None:
    config = replace(CONFIG, max_epochs=12, slots=("one", "two"))
    policy = Script(e1=germinate("two", "conv_light"))
    result = run_heuristic_episode(config, task=own.images, policy=policy)
    assert result.model.slot("two").state.stage.name == "PROBATIONARY"


def test_default_slots_that_a_host_lacks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'early'.*Known: one, two"):
        run_heuristic_episode(RunConfig(max_epochs=1), task=own.images)


def test_a_blueprint_that_fits_no_slot_is_refused_before_the_first_epoch() -> None:
    """It works for 8 channels; the slots have 12. A run without seeds does not ask."""
    narrow = Blueprint("narrow", "features", lambda channels: Residual(nn.Linear(8, 8)))
    task = replace(own.table, blueprints=(narrow,))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="'narrow', with the 12 channels of slot 'early', fails"):
        run_heuristic_episode(CONFIG, task=task)
    assert torch.equal(torch.get_rng_state(), before)
    run_fit(replace(CONFIG, max_epochs=1), task=task)


def test_a_host_with_fewer_classes_than_the_task_is_refused() -> None:
    task = replace(own.table, num_classes=7)
    with pytest.raises(ValueError, match=r"num_classes=7.*logits \[2, 3\], for 3 classes"):
        run_fit(CONFIG, task=task)


def test_a_step_schedule_needs_the_length_of_an_epoch() -> None:
    class Sized:
        def __iter__(self) -> Any:
            inputs, targets = own.table_data(32)
            return iter(zip(inputs.split(8), targets.split(8), strict=True))

    task = replace(own.table, load=lambda: replace(own.load_table(), train=Sized()))
    schedule = ScheduleConfig(kind="cosine", each="step")
    config = replace(CONFIG, max_epochs=1, optim=OptimConfig(schedule=schedule))
    with pytest.raises(ValueError, match="the training loader has no length; set max_batches"):
        run_fit(config, task=task)
    run_fit(replace(config, max_batches=3), task=task)
