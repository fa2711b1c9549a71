"""`evaluate`: what it measures, and that it leaves the model unchanged."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels.testing import SyncCounter
from esper_train import MorphModel, SeedStage, TrainConfig, cnn_host, evaluate
from tests.helpers.classifier import CONFIG, LanguageModel, batches, classifier


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
    assert result.accuracy == pytest.approx(0.8)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


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


def test_nonfinite_logits_are_counted() -> None:
    data = batches((4,))
    data[0][0][2, 0, 0] = math.nan
    result = evaluate(classifier(), data, CONFIG, task_type="classification")
    assert result.nonfinite == 1
    assert math.isnan(result.loss)


def test_topk_counts() -> None:
    model = classifier()
    data = batches()
    result = evaluate(model, data, TrainConfig(topk=(3,)), task_type="classification")
    expected = sum(
        int((model(x).topk(3, dim=1).indices == y[:, None]).any(1).sum()) for x, y in data
    )
    assert result.correct[3] == expected
    assert set(result.correct) == {1, 3}
