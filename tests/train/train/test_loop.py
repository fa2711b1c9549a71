"""`train_one_epoch` and `evaluate` against the same training written out by hand in plain torch."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import KernelConfig
from esper_kernels.testing import SyncCounter
from esper_train import (
    GradConfig,
    HostConfig,
    MorphModel,
    OptimizerRegistry,
    SeedStage,
    TrainConfig,
    cnn_host,
    evaluate,
    train_one_epoch,
)
from esper_train.tasks import get_task, load_splits
from esper_train.train.loop import Batches

CONFIG = TrainConfig()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def batches(sizes: tuple[int, ...] = (8, 8, 3), seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 3, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


class LanguageModel(nn.Module):
    """Tokens [N, T] to logits [N, T, 7]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_train_one_epoch_trains_and_measures_as_plain_torch_does() -> None:
    data = batches()
    ours = classifier()
    plain = classifier()
    result = train_one_epoch(ours, data, sgd(ours), CONFIG, task_type="classification")

    optimizer = sgd(plain)
    losses = []
    correct = 0
    for inputs, targets in data:
        optimizer.zero_grad()
        logits = plain(inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(targets)))
        correct += int((logits.argmax(1) == targets).sum())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # a row's mean
    assert result.loss == pytest.approx(sum(loss * n for loss, n in losses) / 19, rel=1e-6)
    assert result.mean_batch_loss == pytest.approx(sum(loss for loss, _ in losses) / 3, rel=1e-6)
    assert result.accuracy == pytest.approx(100 * correct / 19)
    assert (result.correct, result.valid, result.batches, result.nonfinite) == (
        {1: correct},
        19,
        3,
        0,
    )
    assert not result.compiled
    assert result.backend == "cpp"


def test_digits_are_learned_alike_by_the_compiled_kernels_and_by_torch() -> None:
    curves: list[list[float]] = []
    for backend in ("cpp", "eager"):
        config = TrainConfig(kernel=KernelConfig(backend=backend))
        task = get_task("digits")
        splits = load_splits(task)
        torch.manual_seed(0)
        model = task.build_host(HostConfig())
        optimizer = sgd(model)
        data = list(zip(*(part.split(64) for part in splits.train), strict=True))
        curves.append([])
        for _ in range(3):
            result = train_one_epoch(model, data, optimizer, config, task_type="classification")
            held_out = evaluate(model, [splits.validation], config, task_type="classification")
            assert result.grad is not None
            assert (result.backend, held_out.backend) == (backend, backend)
            curves[-1] += [result.loss, result.grad.gradient_norm, held_out.loss]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][6] < curves[0][0] / 2  # it did learn


def test_short_last_batch_is_weighted_by_its_rows() -> None:
    """8 rows of loss ln 5 each, then 2 rows the model is sure and wrong about: the mean is over 10
    rows."""
    model = nn.Linear(1, 5)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    nn.init.constant_(model.weight[0], 10.0)  # input 1: logits (10, 0, 0, 0, 0)
    data = [(torch.zeros(8, 1), torch.zeros(8).long()), (torch.ones(2, 1), torch.ones(2).long())]
    result = evaluate(model, data, CONFIG, task_type="classification")
    wrong = 10 + math.log(1 + 4 * math.exp(-10))
    assert result.loss == pytest.approx((8 * math.log(5) + 2 * wrong) / 10, rel=1e-6)
    assert result.mean_batch_loss == pytest.approx((math.log(5) + wrong) / 2, rel=1e-6)


def test_language_models_count_correct_tokens_and_skip_ignored_ones() -> None:
    model = LanguageModel()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        best = model(tokens).argmax(-1)
    targets = best.clone()
    targets[0, 1] = (best[0, 1] + 1) % 7  # one wrong
    targets[1, 2] = -100  # one ignored
    result = evaluate(model, [(tokens, targets)], CONFIG, task_type="lm")
    assert (result.correct[1], result.valid) == (4, 5)
    assert result.accuracy == pytest.approx(80.0)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


def test_language_model_training_equals_plain_torch() -> None:
    tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(3))
    ours = LanguageModel()
    plain = LanguageModel()
    result = train_one_epoch(
        ours, [(tokens[:, :-1], tokens[:, 1:])], sgd(ours), CONFIG, task_type="lm"
    )
    optimizer = sgd(plain)
    F.cross_entropy(plain(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.valid == 20


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("every", [0, 1])
def test_train_one_epoch_syncs_once_however_many_batches(count: int, every: int) -> None:
    model = classifier()
    config = TrainConfig(grad=GradConfig(every=every, clip_norm=1.0))
    with SyncCounter() as counter:
        train_one_epoch(
            model, batches((4,) * count), sgd(model), config, task_type="classification"
        )
    assert counter.count == 1


def test_evaluate_syncs_once_with_variants_too() -> None:
    model = grown_model()
    with SyncCounter() as counter:
        evaluate(
            model,
            images(3),
            CONFIG,
            task_type="classification",
            variants={"a": {"early": 0.0}, "b": {}},
        )
    assert counter.count == 1


def test_the_sync_counter_sees_a_sync() -> None:
    """The tests above would be worth nothing otherwise."""
    with SyncCounter() as counter:
        torch.ones(()).item()
        torch.ones(2).tolist()
        bool(torch.ones(()))
    assert counter.count == 3


def images(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(16, 1, 8, 8, generator=generator),
            torch.randint(10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def grown_model() -> MorphModel:
    """A host with a seed in `early` that is fully blended in and does something."""
    torch.manual_seed(0)
    model = MorphModel(cnn_host(image_size=8, in_channels=1, num_classes=10), ("early", "mid"))
    model.germinate_seed("conv_expand", "seed", slot="early")
    slot = model.slot("early")
    fossil = replace(slot.state, stage=SeedStage.FOSSILIZED, alpha=1.0)
    slot.restore(fossil, model.registry.require("cnn", "conv_expand"))
    for parameter in slot.parameters():
        nn.init.normal_(parameter, std=3.0)
    return model


def test_evaluate_variants_measure_the_network_without_the_seed() -> None:
    """The variant with alpha 0 equals a host that never had a seed; the model itself is as
    before."""
    model = grown_model()
    data = images(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = evaluate(
        model,
        data,
        CONFIG,
        task_type="classification",
        variants={"early": {"early": 0.0}, "same": {}},
    )
    bare = evaluate(model.host, data, CONFIG, task_type="classification")
    assert result.variants["early"].loss == bare.loss
    assert result.variants["same"].loss == result.loss
    assert abs(result.loss - bare.loss) > 1e-3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_even_after_an_error(training: bool) -> None:
    model = classifier().train(training)
    evaluate(model, batches(), CONFIG, task_type="classification")
    assert model.training is training
    with pytest.raises(ValueError, match="logits"):
        evaluate(model, batches(), CONFIG, task_type="lm")
    assert model.training is training


def test_evaluate_leaves_no_gradient() -> None:
    model = classifier()
    evaluate(model, batches(), CONFIG, task_type="classification")
    assert all(p.grad is None for p in model.parameters())


def test_max_batches_limits_and_zero_is_an_error() -> None:
    model = classifier()
    assert (
        train_one_epoch(
            model, batches(), sgd(model), CONFIG, task_type="classification", max_batches=2
        ).batches
        == 2
    )
    assert (
        evaluate(model, batches(), CONFIG, task_type="classification", max_batches=7).batches == 3
    )
    with pytest.raises(ValueError, match=r"max_batches must be at least 1.*got 0"):
        evaluate(model, batches(), CONFIG, task_type="classification", max_batches=0)


def test_max_batches_draws_no_further_batch() -> None:
    def source() -> Batches:
        yield from batches((4, 4))
        raise AssertionError("a third batch was drawn")

    assert (
        evaluate(classifier(), source(), CONFIG, task_type="classification", max_batches=2).batches
        == 2
    )


@pytest.mark.parametrize("call", [train_one_epoch, evaluate])
def test_empty_loader_is_refused(call: Callable[..., object]) -> None:
    model = classifier()
    arguments = (sgd(model),) if call is train_one_epoch else ()
    with pytest.raises(ValueError, match="no batch"):
        call(model, [], *arguments, CONFIG, task_type="classification")


def test_bad_target_names_row_and_value_and_changes_nothing() -> None:
    model = classifier()
    before = [p.clone() for p in model.parameters()]
    data = [(torch.zeros(3, 2, 3), torch.tensor([0, 9, 1]))]
    with pytest.raises(IndexError, match=r"target 9 of row \(1,\)"):
        train_one_epoch(model, data, sgd(model), CONFIG, task_type="classification")
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        evaluate(nn.Flatten(), batches(), CONFIG, task_type="classification")


def test_nonfinite_logits_are_counted() -> None:
    data = batches((4,))
    data[0][0][2, 0, 0] = math.nan
    result = evaluate(classifier(), data, CONFIG, task_type="classification")
    assert result.nonfinite == 1
    assert math.isnan(result.loss)


def test_grad_is_the_last_measured_batch_by_group() -> None:
    """With every=2 of 4 batches, the third is measured last; norms from plain torch on the same
    weights."""
    ours = classifier()
    plain = classifier()
    first = ours[1]
    second = ours[3]
    registry = OptimizerRegistry(host=sgd(first), early=sgd(second))
    data = batches((4, 4, 4, 4))
    result = train_one_epoch(
        ours, data, registry, TrainConfig(grad=GradConfig(every=2)), task_type="classification"
    )
    optimizer = sgd(plain)
    for inputs, targets in data[:3]:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        norms = [p.grad.double().norm().item() for p in plain.parameters() if p.grad is not None]
        optimizer.step()
    assert result.grad is not None
    assert result.grad.groups["host"].gradient_norm == pytest.approx(
        math.hypot(*norms[:2]), rel=1e-5
    )
    assert result.grad.groups["early"].gradient_norm == pytest.approx(
        math.hypot(*norms[2:]), rel=1e-5
    )
    assert result.grad.gradient_norm == pytest.approx(math.hypot(*norms), rel=1e-5)
    assert result.grad.groups["host"].elements == 6 * 8 + 8


def test_grad_is_none_when_never_measured() -> None:
    model = classifier()
    config = TrainConfig(grad=GradConfig(every=0))
    assert (
        train_one_epoch(model, batches(), sgd(model), config, task_type="classification").grad
        is None
    )


def test_nonfinite_gradients_are_summed_over_the_epoch() -> None:
    """NaN in the first of three batches only: the last batch is clean, the epoch's count is not."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return torch.full_like(grad, math.nan)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.inner(x.flatten(1))
            return Spoil.apply(y) if self.calls == 1 else y

    class Still(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            """Keep the weights clean of the NaN."""

    model = Model()
    optimizer = Still(model.parameters(), lr=0.1)
    result = train_one_epoch(
        model,
        batches(),
        optimizer,
        replace(CONFIG, on_bad_numbers="warn"),
        task_type="classification",
    )
    assert result.grad is not None
    assert result.grad.nan_count == 6 * 5 + 5
    assert result.grad.inf_count == 0
    assert result.grad.gradient_health == 0.0
    assert math.isfinite(result.grad.gradient_norm)


def test_clipping_uses_the_total_norm_over_groups() -> None:
    ours = classifier()
    plain = classifier()
    registry = OptimizerRegistry(host=sgd(ours[1]), early=sgd(ours[3]))
    data = batches((8, 8))
    train_one_epoch(
        ours,
        data,
        registry,
        TrainConfig(grad=GradConfig(clip_norm=0.05)),
        task_type="classification",
    )
    optimizer = sgd(plain)
    for inputs, targets in data:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05  # it does clip
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_topk_counts() -> None:
    model = classifier()
    data = batches()
    result = evaluate(model, data, TrainConfig(topk=(3,)), task_type="classification")
    expected = sum(
        int((model(x).topk(3, dim=1).indices == y[:, None]).any(1).sum()) for x, y in data
    )
    assert result.correct[3] == expected
    assert set(result.correct) == {1, 3}
