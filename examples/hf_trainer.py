"""Hugging Face's Trainer on Python's standard library, with a small GPT-2 from random weights.

pip install 'esper-kernels[hf]'
python examples/hf_trainer.py [--patch]     # --patch: the loss without logits
"""

import sys
import tempfile

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from esper_kernels import Meter
from esper_kernels.integrations.fused_head import patch
from esper_kernels.integrations.huggingface import MeterLogs, causal_lm_loss
from esper_train import get_task


class MeteredTrainer(MeterLogs, Trainer):
    """The Trainer, with accuracy and perplexity in its log."""


def sequences(tokens: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(fused: bool) -> None:
    torch.manual_seed(0)
    splits = get_task("pysource").load()  # bytes, in sequences of 64
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    meter = Meter("cpu", topk=(1, 5))
    eval_meter = Meter("cpu", topk=(1, 5))
    loss = None if fused else causal_lm_loss(meter, eval_meter=eval_meter)
    if fused:
        patch(model, meter)
    with tempfile.TemporaryDirectory() as out:
        trainer = MeteredTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                max_steps=60,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                logging_steps=20,
                logging_nan_inf_filter=False,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=sequences(splits.train[0]),
            eval_dataset=sequences(splits.validation[0][:64]),
            compute_loss_func=loss,
            meter=meter,
            eval_meter=None if fused else eval_meter,
        )
        trainer.train()
        found = trainer.evaluate()
    print(f"after {trainer.state.global_step} steps: validation loss {found['eval_loss']:.3f}")
    if not fused:
        print(f"{found['eval_accuracy']:.1%} of the bytes right")


if __name__ == "__main__":
    main(fused="--patch" in sys.argv[1:])
