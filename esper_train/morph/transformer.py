"""A decoder-only transformer as a host: pre-norm, causal, with tied embeddings."""

import math

from torch import Tensor, nn

from esper_train.base.names import require_size
from esper_train.morph.blueprints import CausalAttention, Residual
from esper_train.morph.host import Host, cut

INITIAL_STD = 0.02
"""Standard deviation of the initial weights, as in GPT-2 (Radford et al., 2019)."""


class Embedding(nn.Module):
    """Token and learned position embeddings, added: int64 tokens [N, T], T <= `context`, to [N, T,
    width]."""

    def __init__(self, vocab_size: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        context = self.position.num_embeddings
        if length > context:
            raise ValueError(
                f"expected at most {context} tokens, the host's context, got {length}: cut the "
                "sequences, or build the host with a longer context"
            )
        return self.dropout(self.token(tokens) + self.position.weight[:length])


class Block(nn.Sequential):
    """x + attention(norm(x)), then x + mlp(norm(x)) with four times the width inside; [N, T, C]."""

    def __init__(self, width: int, heads: int | None, dropout: float) -> None:
        mix = [nn.LayerNorm(width), CausalAttention(width, heads), nn.Linear(width, width)]
        mlp = [
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        ]
        super().__init__(Residual(*mix, nn.Dropout(dropout)), Residual(*mlp, nn.Dropout(dropout)))


def transformer_host(
    *,
    vocab_size: int,
    context: int,
    width: int = 64,
    depth: int = 3,
    heads: int | None = None,
    dropout: float = 0.0,
) -> Host:
    """A language model from int64 tokens [N, T], T <= `context`, to logits [N, T, vocab_size].

    `depth` blocks are split into segments of about equal depth. The weight of the head is the token
    embedding. `heads` must divide the width (else `ValueError`), and defaults to the largest of 4,
    3, 2, 1 that does. `dropout` acts on the embedding and on the output of each branch. The first
    loss is near ln(vocab_size).
    """
    sizes = {"vocab_size": vocab_size, "context": context, "width": width, "depth": depth}
    if heads is not None:
        sizes["heads"] = heads
    for name, size in sizes.items():
        require_size(size, name)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number in [0, 1], got {dropout!r}")
    segments = cut([Block(width, heads, dropout) for _ in range(depth)])
    embedding = Embedding(vocab_size, context, width, dropout)
    segments["early"].insert(0, embedding)
    unembedding = nn.Linear(width, vocab_size, bias=False)
    unembedding.weight = embedding.token.weight
    head = nn.Sequential(nn.LayerNorm(width), unembedding)
    host = Host("transformer", segments, head, dict.fromkeys(segments, width))
    for module in host.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INITIAL_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in host.named_parameters():
        # the outputs of the 2 * depth branches
        if name.endswith(("0.branch.2.weight", "1.branch.3.weight")):
            nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(2 * depth))
    return host
