"""Sequences of tokens with labels of several lengths, and small language models."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 97
LENGTH = 12
FREQUENT = 10
"""Only the first tokens occur, which a model learns in a few steps."""


def sequences(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples as a collator of Hugging Face takes them; many labels are -100, in one sample all."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        tokens = torch.randint(FREQUENT, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[LENGTH - number % LENGTH :] = -100
        if number == 2:
            labels[:] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def small_llama() -> Any:
    """A model whose head has weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def small_gpt2() -> Any:
    """A model whose head is its embedding; without dropout, so that two of them train alike."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)
