"""Models, batches and losses as users have them, each with its plain PyTorch counterpart."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The arguments of the loop, and the same training in plain PyTorch."""

    task_type: str
    model: Callable[[], nn.Module]
    batches: list[Any]
    loss: Loss
    """The mean loss of a batch."""
    rows: Callable[[Any], float]
    """The weight of a batch's mean loss in the mean over several batches."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the loop: criterion, forward, batch."""
    by_batch: bool = False
    """Whether accumulated batches count alike, whatever their rows."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Output:
    """An output in the form that Hugging Face models return."""

    logits: Tensor
    loss: Tensor | None = None


class Pooled(nn.Module):
    """Classifies sequences of tokens; `wrap` makes the output."""

    def __init__(self, wrap: Callable[[Tensor], Any] = Output) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)
        self.wrap = wrap

    def forward(self, input_ids: Tensor, attention_mask: Tensor, note: str = "none") -> Any:
        assert note in ("none", "kept")
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.wrap(self.head(self.norm(x.sum(1))))


class Tagger(nn.Module):
    """Tokens [N, T] to a dict with logits [N, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(x), "hidden": x}


def conv() -> nn.Module:
    """Images [N, 2, H, W] to logits [N, 3, H, W]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1)
    )


def perceptron(out: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out))


def sentences(labels: str = "labels", extra: bool = False) -> list[dict[str, Any]]:
    """Dicts as a tokenizer and a collator make them; a ragged last one."""
    random = generator(1)
    found: list[dict[str, Any]] = []
    for n in (6, 6, 3):
        batch: dict[str, Any] = {
            "input_ids": torch.randint(11, (n, 7), generator=random),
            "attention_mask": torch.randint(2, (n, 7), generator=random),
            labels: torch.randint(4, (n,), generator=random),
        }
        found.append(batch | ({"note": "kept"} if extra else {}))
    return found


def images(soft: bool = False) -> list[tuple[Tensor, Tensor]]:
    random = generator(2)
    found = []
    for n in (4, 4, 2):
        x = torch.randn(n, 2, 5, 3, generator=random)
        t = torch.randint(3, (n, 5, 3), generator=random)
        t[0, 0, 0] = -100
        shares = torch.rand(n, 3, 5, 3, generator=random).softmax(1)
        found.append((x, shares if soft else t))
    return found


def rows(mixed: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Points and classes, or MixUp of them: each row and its shares are a mixture of two."""
    random = generator(3)
    found = []
    for n in (6, 6, 3):
        x = torch.randn(n, 4, generator=random)
        t = torch.randint(3, (n,), generator=random)
        if mixed:
            share = torch.rand(n, 1, generator=random)
            hot = F.one_hot(t, 3).float()
            x, t = share * x + (1 - share) * x.flip(0), share * hot + (1 - share) * hot.flip(0)
        found.append((x, t))
    return found


def curves() -> list[tuple[Tensor, Tensor]]:
    return [(x, x[:, :2].sin()) for x, _ in rows()]


def hf_loss(labels: str = "labels") -> Loss:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != labels}
        output = model(**inputs)
        logits = output.logits if hasattr(output, "logits") else output[0]
        return F.cross_entropy(logits, batch[labels])

    return loss


def pair_loss(criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: criterion(model(batch[0]), batch[1])


def valid(batch: tuple[Tensor, Tensor]) -> float:
    return float((batch[1] != -100).sum())


def first(batch: tuple[Tensor, Tensor]) -> float:
    return float(len(batch[0]))


WEIGHT = torch.tensor([0.5, 2.0, 1.0])
TAGS = [
    {
        "input_ids": torch.randint(11, (n, 4), generator=generator(n)),
        "targets": torch.randint(5, (n, 4), generator=generator(n + 1)),
    }
    for n in (6, 5)
]
TRIPLES = [(x[:, :2], x[:, 2:], t) for x, t in rows()]

PROBLEMS = {
    "dict batches, .logits": Problem(
        task_type="classification",
        model=Pooled,
        batches=sentences(),
        loss=hf_loss(),
        rows=lambda b: len(b["labels"]),
    ),
    "dict batches, a tuple": Problem(
        task_type="classification",
        model=lambda: Pooled(lambda logits: (logits, "more")),
        batches=sentences("label", extra=True),
        loss=hf_loss("label"),
        rows=lambda b: len(b["label"]),
    ),
    "tokens, ['logits']": Problem(
        task_type="lm",
        model=Tagger,
        batches=TAGS,
        loss=lambda model, b: F.cross_entropy(
            model(b["input_ids"])["logits"].flatten(0, 1), b["targets"].flatten()
        ),
        rows=lambda b: b["targets"].numel(),
    ),
    "pairs of a list and targets": Problem(
        task_type="classification",
        model=lambda: Pooled(lambda logits: [logits]),
        batches=[([b["input_ids"], b["attention_mask"]], b["labels"]) for b in sentences()],
        loss=lambda model, b: F.cross_entropy(model(*b[0])[0], b[1]),
        rows=lambda b: len(b[1]),
    ),
    "forward and batch of one's own": Problem(
        task_type="classification",
        model=perceptron,
        batches=TRIPLES,
        loss=lambda model, b: F.cross_entropy(-model(torch.cat(b[:2], 1)), b[2]),
        rows=lambda b: len(b[2]),
        options={
            "batch": lambda b: (b[:2], b[2]),
            "forward": lambda model, inputs: -model(torch.cat(inputs, 1)),
        },
    ),
    "dense": Problem(
        task_type="dense",
        model=conv,
        batches=images(),
        loss=pair_loss(F.cross_entropy),
        rows=valid,
    ),
    "dense, weighted and smoothed": Problem(
        task_type="dense",
        model=conv,
        batches=images(),
        loss=pair_loss(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
        rows=lambda b: float(WEIGHT[b[1][b[1] >= 0]].sum()),
        options={"criterion": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)},
    ),
    "dense, a criterion of one's own": Problem(
        task_type="dense",
        model=conv,
        batches=images(),
        loss=pair_loss(lambda logits, t: F.cross_entropy(logits, t) * 2),
        rows=valid,
        options={"criterion": lambda logits, t: F.cross_entropy(logits, t) * 2},
        by_batch=True,
    ),
    "dense, shares": Problem(
        task_type="dense",
        model=conv,
        batches=images(soft=True),
        loss=pair_loss(F.cross_entropy),
        rows=lambda b: b[1].numel() / 3,
    ),
    "regression": Problem(
        task_type="regression",
        model=lambda: perceptron(2),
        batches=curves(),
        loss=pair_loss(F.mse_loss),
        rows=first,
        options={"criterion": nn.MSELoss()},
        by_batch=True,
    ),
    "MixUp": Problem(
        task_type="classification",
        model=perceptron,
        batches=rows(mixed=True),
        loss=pair_loss(F.cross_entropy),
        rows=first,
    ),
    "MixUp, weighted and smoothed": Problem(
        task_type="classification",
        model=perceptron,
        batches=rows(mixed=True),
        loss=pair_loss(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
        rows=first,
        options={"criterion": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)},
    ),
    "MixUp and classes in turn": Problem(
        task_type="classification",
        model=perceptron,
        batches=[*rows(mixed=True)[:1], *rows()[:2], *rows(mixed=True)[2:]],
        loss=pair_loss(F.cross_entropy),
        rows=first,
    ),
}
