"""`train.linear_loss`: the step of a model with `features` and `output_layer`, without logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_kernels import CrossEntropyLoss, Meter
from esper_train import TrainConfig, build_train_step, train_one_epoch
from esper_train.morph.model import MorphModel
from esper_train.morph.transformer import transformer_host
from esper_train.train.config import AmpConfig, CompileConfig

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randint(50, (3, 8), generator=GENERATOR)
TARGETS = torch.randint(50, (3, 8), generator=GENERATOR)
TARGETS[:, ::3] = -100
Build = Callable[[], nn.Module]


class Classifier(nn.Module):
    """A classifier whose last layer has a bias and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 6)
        self.output_layer = nn.Linear(6, 50)

    def features(self, x: Tensor) -> Tensor:
        return self.embedding(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.features(x))


def tied() -> MorphModel:
    return MorphModel(transformer_host(vocab_size=50, context=8, width=8, depth=3), ["mid"])


def gradients(
    build: Build, config: TrainConfig, targets: Any = TARGETS, **options: Any
) -> tuple[dict[str, Tensor], Meter, str]:
    torch.manual_seed(0)
    model = build()
    meter = Meter("cpu", topk=(5,))
    step = build_train_step("lm", config, **options)
    step(model, INPUTS, targets, meter)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, meter, step.backend(torch.device("cpu"))


@pytest.mark.parametrize("build", [Classifier, tied])
@pytest.mark.parametrize(
    "criterion",
    [
        None,
        nn.CrossEntropyLoss(torch.linspace(0.5, 2.0, 50), label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        CrossEntropyLoss(z_loss=0.05, softcap=4.0),
    ],
    ids=str,
)
def test_gradients_and_counts_are_those_of_the_logits(
    build: Build, criterion: nn.CrossEntropyLoss | None
) -> None:
    actual, meter, backend = gradients(build, TrainConfig(linear_loss=True), criterion=criterion)
    expected, expected_meter, _ = gradients(build, TrainConfig(), criterion=criterion)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(meter.counts, expected_meter.counts)
    torch.testing.assert_close(meter.sums, expected_meter.sums)
    assert backend.endswith(" (without logits)")


@pytest.mark.parametrize(
    "more",
    [
        {"amp": AmpConfig(dtype="bfloat16")},
        {"amp": AmpConfig(dtype="float16", init_scale=1024.0)},
        {"compile": CompileConfig(enabled=True, backend="aot_eager")},
    ],
    ids=str,
)
def test_with_mixed_precision_and_a_compiler(more: dict[str, Any]) -> None:
    actual, meter, _ = gradients(Classifier, TrainConfig(linear_loss=True, **more))
    expected, expected_meter, _ = gradients(Classifier, TrainConfig(**more))
    for name, grad in actual.items():
        assert grad.dtype == torch.float32
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < (1e-2 if "amp" in more else 1e-5)
    assert torch.equal(meter.counts[:4], expected_meter.counts[:4])  # ties in bfloat16 may differ


def test_an_epoch_with_accumulation_is_the_same() -> None:
    results = []
    for linear_loss in (False, True):
        torch.manual_seed(0)
        model = tied()
        result = train_one_epoch(
            model,
            [(INPUTS, TARGETS), (INPUTS[:1], TARGETS[:1]), (INPUTS, TARGETS)],
            torch.optim.SGD(model.parameters(), lr=0.1),
            TrainConfig(linear_loss=linear_loss, accumulate=2),
            task_type="lm",
        )
        results.append((result, [p.detach().clone() for p in model.parameters()]))
    assert results[1][0].loss == pytest.approx(results[0][0].loss, rel=1e-6)
    assert results[1][0].correct == results[0][0].correct
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


def test_a_frozen_last_layer_gets_no_gradient() -> None:
    def frozen() -> Classifier:
        model = Classifier()
        model.output_layer.requires_grad_(False)
        return model

    actual, _, _ = gradients(frozen, TrainConfig(linear_loss=True))
    expected, _, _ = gradients(frozen, TrainConfig())
    assert actual.keys() == expected.keys() == {"embedding.weight"}
    torch.testing.assert_close(actual, expected)


def test_soft_targets_still_have_logits() -> None:
    soft = torch.randn(3, 8, 50, generator=GENERATOR).softmax(-1)
    actual, _, backend = gradients(Classifier, TrainConfig(linear_loss=True), soft)
    expected, _, _ = gradients(Classifier, TrainConfig(), soft)
    torch.testing.assert_close(actual, expected)
    assert backend == "eager (soft targets)"


@pytest.mark.parametrize(
    ("task_type", "options", "words"),
    [
        ("dense", {}, "serves the task types classification, lm, got 'dense'"),
        ("lm", {"criterion": lambda x, t: x.sum()}, "no criterion but nn.CrossEntropyLoss"),
        ("lm", {"forward": lambda model, x: model(x)}, "takes no forward="),
    ],
)
def test_what_it_cannot_serve_is_refused(
    task_type: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"train.linear_loss .*{words}"):
        build_train_step(task_type, TrainConfig(linear_loss=True), **options)


def test_a_model_without_features_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 50))
    meter = Meter("cpu")
    step = build_train_step("lm", TrainConfig(linear_loss=True))
    with pytest.raises(ValueError, match=r"features\(inputs\) and output_layer.*got Sequential"):
        step(model, INPUTS, TARGETS, meter)
    assert not meter.counts.any()


class Halved(nn.Linear):
    """A last layer that does more than the product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def with_a_subclass() -> nn.Module:
    model = Classifier()
    model.output_layer = Halved(6, 50)
    return model


def with_a_hooked_layer() -> nn.Module:
    model = Classifier()
    model.output_layer.register_forward_hook(lambda layer, inputs, logits: logits / 2)
    return model


def with_a_hooked_model() -> nn.Module:
    model = Classifier()
    model.register_forward_hook(lambda model, inputs, logits: logits / 2)
    return model


def with_another_forward() -> nn.Module:
    model = Classifier()
    model.output_layer.forward = lambda x: x @ torch.ones(6, 50)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (with_a_subclass, r"an nn.Linear .* got Classifier with output_layer Halved"),
        (with_a_hooked_layer, "leave out the hooks, or the replaced forward, of output_layer"),
        (with_a_hooked_model, "leave out the hooks, or the replaced forward, of the model"),
        (with_another_forward, "leave out the hooks, or the replaced forward, of output_layer"),
    ],
)
def test_a_model_that_computes_other_logits_is_refused(build: Build, words: str) -> None:
    meter = Meter("cpu")
    step = build_train_step("lm", TrainConfig(linear_loss=True))
    with pytest.raises(ValueError, match=words):
        step(build(), INPUTS, TARGETS, meter)
    assert not meter.counts.any()


def test_a_bad_target_is_masked_where_a_run_goes_on() -> None:
    targets = TARGETS.clone()
    targets[0, 1] = 77
    config = TrainConfig(linear_loss=True, on_bad_numbers="warn")
    _, meter, _ = gradients(Classifier, config, targets)
    assert meter.compute(strict=False).bad_targets == 1
