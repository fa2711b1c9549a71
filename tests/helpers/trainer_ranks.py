"""Hugging Face's Trainer, and two processes of it: with its own loss, and with ours."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper_kernels import Meter
from esper_kernels.integrations.huggingface import MeterLogs, causal_lm_loss
from tests.helpers.tokens import sequences, small_llama

BATCH = 4


def trainers_of_a_rank(
    steps: int, accumulations: tuple[int, ...], rank: int, directory: Path
) -> dict[int, dict[str, Any]]:
    """The log of each trainer, and the counts of a separate pass over this rank's rows."""
    # what torchrun sets; the process group is there already
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return {n: both_trainers(steps, n, directory) for n in accumulations}


def both_trainers(steps: int, accumulate: int, directory: Path) -> dict[str, Any]:
    """Rows are [right, counted] of each batch, from its logits."""
    settings: dict[str, Any] = {"steps": steps, "accumulate": accumulate, "ranks": 2}
    settings["evaluated"] = 2 * 2 * BATCH  # whole batches, of which no rank repeats a sequence
    stock = trainer_of(small_llama(), directory / "out", **settings)
    stock.train()
    meter, eval_meter = Meter("cpu"), Meter("cpu")
    ours = causal_lm_loss(meter, eval_meter=eval_meter)
    rows: list[Tensor] = []

    def watched(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs["logits"][:, :-1], labels[:, 1:]
        right = (logits.argmax(-1) == targets)[targets != -100]
        rows.append(torch.tensor([right.sum(), right.numel()]))
        return ours(outputs, labels, num_items_in_batch)

    trainer = trainer_of(
        small_llama(),
        directory / "out",
        **settings,
        compute_loss_func=watched,
        meter=meter,
        eval_meter=eval_meter,
    )
    trainer.train()
    trained = torch.stack(rows).tolist()
    found = trainer.evaluate()
    return {
        "stock": logged(stock, "loss"),
        "losses": logged(trainer, "loss"),
        "accuracies": logged(trainer, "accuracy"),
        "rows": trained,
        "eval_accuracy": found["eval_accuracy"],
        "full_pass": full_pass(trainer.model.eval(), trainer.eval_dataset),
    }


@torch.no_grad()
def full_pass(model: Any, samples: list[dict[str, Tensor]]) -> float:
    """Accuracy of the tokens of all samples, one after the other, in this process alone."""
    right = []
    for sample in samples:
        targets = sample["labels"][1:]
        logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1]
        right.append((logits.argmax(-1) == targets)[targets != -100])
    return torch.cat(right).double().mean().item()


def trainer_of(
    model: nn.Module,
    directory: Path,
    *,
    steps: int,
    accumulate: int = 1,
    ranks: int = 1,
    evaluated: int = 11,
    logging_steps: int = 1,
    **options: Any,
) -> Any:
    """A Trainer for `steps` steps over an epoch whose last batch is short on every rank.
    `evaluated` is the number of sequences of an evaluation."""
    from transformers import Trainer, TrainingArguments

    class MeteredTrainer(MeterLogs, Trainer):
        pass

    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=0.01,
        logging_steps=logging_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_nan_inf_filter=False,
        seed=0,
    )
    return MeteredTrainer(
        model=model,
        args=arguments,
        train_dataset=sequences(steps * BATCH * accumulate * ranks - 1 - ranks),
        eval_dataset=sequences(evaluated, seed=1),
        **options,
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
