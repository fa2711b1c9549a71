"""Hugging Face's Trainer with our loss: the stock Trainer's losses, true metrics, no further host
sync."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import Meter, cross_entropy
from esper_kernels.integrations.fused_head import patch
from esper_kernels.integrations.huggingface import causal_lm_loss, measures, next_tokens
from esper_kernels.testing import SyncCounter
from tests.helpers.ranks import together
from tests.helpers.tokens import VOCABULARY, small_gpt2, small_llama
from tests.helpers.trainer_ranks import logged, trainer_of, trainers_of_a_rank

pytestmark = [
    pytest.mark.slow,  # transformers takes seconds to import
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def needs_transformers() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="needs the extra hf")


def counts(model: nn.Module, samples: list[dict[str, Tensor]]) -> tuple[float, float, float]:
    """Loss, accuracy and top-5 accuracy of a pass in plain PyTorch, one sequence at a time."""
    losses = []
    correct = []
    in_top = []
    for sample in samples:
        targets = sample["labels"][1:]
        logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1][targets != -100]
        targets = targets[targets != -100]
        losses.append(F.cross_entropy(logits.double(), targets, reduction="none"))
        correct.append(logits.argmax(-1) == targets)
        in_top.append((logits.topk(5).indices == targets[:, None]).any(-1))
    found = [torch.cat(part).double().mean().item() for part in (losses, correct, in_top)]
    return found[0], found[1], found[2]


MODELS = pytest.mark.parametrize("make", [small_llama, small_gpt2])
ACCUMULATION = pytest.mark.parametrize("accumulate", [1, 4])


@MODELS
@ACCUMULATION
def test_losses_are_those_of_the_stock_trainer(
    tmp_path: Path, accumulate: int, make: Callable[[], Any]
) -> None:
    runs = []
    for loss in (None, causal_lm_loss(Meter("cpu"))):
        model = make()
        trainer = trainer_of(
            model, tmp_path, steps=20, accumulate=accumulate, compute_loss_func=loss
        )
        trainer.train()
        runs.append((logged(trainer, "loss"), torch.cat([p.flatten() for p in model.parameters()])))
    (stock_losses, stock_weights), (losses, weights) = runs
    assert len(losses) == 20
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    assert stock_losses[-1] < stock_losses[0] - 0.1
    torch.testing.assert_close(weights, stock_weights, rtol=0, atol=1e-4)


def test_token_classification_trains_as_with_the_stock_loss(tmp_path: Path) -> None:
    """Uses the function on the page about trainers."""
    from transformers import BertConfig, BertForTokenClassification

    meter = Meter("cpu")

    def ours(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return cross_entropy(outputs["logits"], labels, normalizer=num_items_in_batch, meter=meter)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCABULARY, num_labels=10, intermediate_size=16, **sizes)
    losses = []
    for loss in (None, ours):
        torch.manual_seed(0)
        trainer = trainer_of(
            BertForTokenClassification(config), tmp_path, steps=5, compute_loss_func=loss
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert meter.compute().batches == 5


def test_the_log_has_the_metrics_that_separate_passes_find(tmp_path: Path) -> None:
    """Each step's batch is counted from its logits, and the evaluation from a full pass."""
    meter = Meter("cpu", topk=(1, 5))
    eval_meter = Meter("cpu", topk=(1, 5))
    ours = causal_lm_loss(meter, eval_meter=eval_meter)
    seen = []

    def watched(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            logits, targets = outputs.logits[:, :-1], labels[:, 1:]
            right = (logits.argmax(-1) == targets)[targets != -100]
            seen.append(right.double().mean().item())
        return ours(outputs, labels, num_items_in_batch)

    model = small_llama()
    trainer = trainer_of(
        model, tmp_path, steps=4, compute_loss_func=watched, meter=meter, eval_meter=eval_meter
    )
    trainer.train()
    assert logged(trainer, "accuracy") == seen
    losses = torch.tensor(logged(trainer, "loss"))
    assert logged(trainer, "perplexity") == pytest.approx(losses.exp().tolist(), rel=1e-4)
    assert len(logged(trainer, "top5_accuracy")) == 4

    found = trainer.evaluate()
    loss, accuracy, top5 = counts(model.eval(), trainer.eval_dataset)
    assert found["eval_accuracy"] == accuracy
    assert found["eval_top5_accuracy"] == top5
    assert found["eval_perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert logged(trainer, "eval_accuracy") == [accuracy]


def test_two_processes_train_as_the_stock_trainer_and_log_the_accuracy_of_both(
    tmp_path: Path,
) -> None:
    """There are 20 steps, ragged labels, and a last batch that is short."""
    found, other = together(2, partial(trainers_of_a_rank, 20, (1, 4)), tmp_path)
    for accumulate, run in found.items():
        assert len(run["losses"]) == 20
        assert run["losses"] == pytest.approx(run["stock"], abs=1e-5)
        assert run["losses"][-1] < run["losses"][0] - 0.1
        rows = torch.tensor([run["rows"], other[accumulate]["rows"]]).sum(0)
        right, counted = rows.view(20, accumulate, 2).sum(1).unbind(1)
        assert run["accuracies"] == (right.double() / counted).tolist()
        assert run["accuracies"] == other[accumulate]["accuracies"]
        assert run["eval_accuracy"] == run["full_pass"] == other[accumulate]["full_pass"]


@pytest.mark.parametrize(
    ("logit", "perplexity"), [(0.0, 2.0), (math.log(3), 4 / 3), (-2000.0, math.inf)]
)
def test_perplexity_is_the_exponential_of_the_loss(logit: float, perplexity: float) -> None:
    meter = Meter("cpu")
    cross_entropy(torch.tensor([[logit, 0.0]]), torch.tensor([0]), meter=meter)
    found = measures(meter.compute(), "eval_")
    assert found == {"eval_accuracy": logit >= 0, "eval_perplexity": pytest.approx(perplexity)}
    assert math.isnan(measures(Meter("cpu").compute())["perplexity"])


def test_no_host_sync_is_added(tmp_path: Path) -> None:
    """A step has none, and a log entry has one read of the meter beside the Trainer's own."""

    def syncs(logging_steps: int, **options: Any) -> int:
        trainer = trainer_of(
            small_llama(), tmp_path, steps=6, logging_steps=logging_steps, **options
        )
        with SyncCounter() as counter:
            trainer.train()
        return counter.count

    meter = Meter("cpu", topk=(1, 5))
    metered = {"compute_loss_func": causal_lm_loss(meter), "meter": meter}
    assert syncs(100, **metered) == syncs(100)
    assert syncs(2, **metered) == syncs(2) + 3


def test_a_shift_copies_no_logits() -> None:
    """The gradient is written for all positions at once: 0 at the last."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[4, 1, 2], [0, -100, 3]])
    assert next_tokens(labels).tolist() == [[1, 2, -100], [-100, 3, -100]]
    loss = causal_lm_loss()({"logits": logits}, labels, torch.tensor(6))
    kept = [x for x in loss.grad_fn.saved_tensors if x.shape == logits.shape]  # type: ignore[union-attr]
    assert [x.data_ptr() for x in kept] == [logits.data_ptr()]
    rows = torch.cat([logits[0, :2], logits[1, 1:2]])
    expected = F.cross_entropy(rows, torch.tensor([1, 2, 3]), reduction="sum") / 6
    torch.testing.assert_close(loss, expected)
    (actual,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])


@MODELS
@ACCUMULATION
def test_a_patched_model_trains_as_the_stock_one(
    tmp_path: Path, accumulate: int, make: Callable[[], Any]
) -> None:
    meter = Meter("cpu")
    model = make()
    undo = patch(model, meter)
    fused = trainer_of(model, tmp_path, steps=20, accumulate=accumulate, meter=meter)
    fused.train()
    undo()
    stock = trainer_of(make(), tmp_path, steps=20, accumulate=accumulate)
    stock.train()
    assert logged(fused, "loss") == pytest.approx(logged(stock, "loss"), abs=1e-5)
    assert len(logged(fused, "accuracy")) == 20


def test_patch_leaves_other_calls_to_the_model_and_is_undone() -> None:
    model = small_gpt2()
    tokens = torch.arange(6)[None]
    expected = model(input_ids=tokens, labels=tokens)
    undo = patch(model)
    loss = model(input_ids=tokens, labels=tokens)
    assert loss.logits is None
    torch.testing.assert_close(loss.loss, expected.loss)
    torch.testing.assert_close(model(input_ids=tokens).logits, expected.logits)
    evaluated = model.eval()(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(evaluated.logits, expected.logits)
    model.train()
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    undo()
    assert model(input_ids=tokens, labels=tokens).logits is not None


def test_a_copy_of_a_patched_model_uses_its_own_weights() -> None:
    model = small_llama()
    patch(model)
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.lm_head.weight)
    tokens = torch.arange(6)[None]
    assert copied(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(
        math.log(VOCABULARY)
    )
    asked = model(input_ids=tokens, labels=tokens, output_hidden_states=True)
    assert len(asked.hidden_states) == 3
    assert asked.loss.item() != pytest.approx(math.log(VOCABULARY))


def test_patch_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gpt2()
    whole: Callable[..., Any] = type(model).forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = whole(self, *args, **kwargs)
        outputs.logits = 30 * (outputs.logits / 30).tanh()
        return outputs

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(ValueError, match="causal_lm_loss"):
        patch(model)
    assert model.training
    monkeypatch.undo()
    model.lm_head = nn.Sequential(nn.Linear(32, VOCABULARY))
    with pytest.raises(TypeError, match=r"nn\.Linear, got Sequential"):
        patch(model)
    with pytest.raises(TypeError, match="of transformers, got Linear"):
        patch(nn.Linear(2, 2))
