"""Whole runs of every kind of task: reported, stopped and resumed bit for bit, loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_train import (
    EpisodeResult,
    Host,
    HostConfig,
    Splits,
    Task,
    TelemetryHub,
    load_run,
    run_fit,
    run_heuristic_episode,
)
from esper_train.run.checkpoint import saved
from esper_train.run.directory import read_metrics
from esper_train.run.report import write_report
from esper_train.train.forward import call, logits_of
from tests.helpers import own
from tests.helpers.growing_run import reported
from tests.helpers.own import CONFIG
from tests.helpers.problems import Output, images, sentences
from tests.helpers.scripted import Script, StopAfter, germinate

HIDDEN = 6


class Embedded(nn.Module):
    """The mean of the tokens that the mask shows, as a Hugging Face model takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, HIDDEN)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        return (self.embed(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x))


def sentence_host(config: HostConfig) -> Host:
    early = Embedded()
    mid = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
    return Host("features", {"early": early, "mid": mid}, Head(), {"early": HIDDEN, "mid": HIDDEN})


def dense_host(config: HostConfig) -> Host:
    """Images [N, 2, H, W] to logits [N, 3, H, W]."""

    def segment(inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU()
        )

    segments = {"early": segment(2), "mid": segment(5)}
    return Host("cnn", segments, nn.Conv2d(5, 3, 1), dict.fromkeys(segments, 5))


def same(batches: list[Any]) -> Splits:
    return Splits(train=batches, validation=batches, test=batches)


def curves() -> Splits:
    inputs, _ = own.table_data()
    data = inputs, inputs[:, :3].sin()
    return Splits(train=data, validation=data, test=data)


def mixed(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al., 2018) of each row with another one."""
    share = torch.rand(len(inputs), 1)
    hot = F.one_hot(targets, own.CLASSES).float()
    other = torch.randperm(len(inputs))
    return (
        share * inputs + (1 - share) * inputs[other],
        share * hot + (1 - share) * hot[other],
    )


def own_optimizer(
    parameters: Sequence[nn.Parameter], lr: float, group: str
) -> torch.optim.Optimizer:
    return torch.optim.NAdam(parameters, lr=lr)


def halved(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    return {"logits": model(inputs / 2)}


sentence = Task(
    name="sentence",
    task_type="classification",
    num_classes=4,
    load=lambda: same(sentences()),
    build_host=sentence_host,
)
pixels = Task(
    name="pixels",
    task_type="dense",
    num_classes=3,
    load=lambda: same(images()),
    build_host=dense_host,
)
curve = replace(
    own.table,
    name="curve",
    task_type="regression",
    num_classes=None,
    load=curves,
    criterion=nn.MSELoss(),
)


@dataclass(frozen=True)
class Kind:
    task: Task
    inputs: Any
    """An example for the trained network."""
    mode: str = "heuristic"
    backend: str = "cpp"


ROWS = torch.randn(5, own.COLUMNS)
KINDS = {
    "dict batches, .logits": Kind(
        sentence, {key: x for key, x in sentences()[0].items() if key != "labels"}
    ),
    "dense": Kind(pixels, images()[0][0]),
    "regression": Kind(curve, ROWS, "fit", "eager criterion"),
    "MixUp": Kind(
        replace(own.table, name="mixed", augment=mixed), ROWS, backend="eager (soft targets)"
    ),
    "own optimizers": Kind(replace(own.table, name="nadam", make_optimizer=own_optimizer), ROWS),
    "own forward": Kind(replace(own.table, name="halved", forward=halved), ROWS, "fit"),
}


def run(kind: Kind, out: Path, **more: Any) -> EpisodeResult:
    """Ten epochs; where the network grows, a seed trains and is blended in."""
    config = replace(CONFIG, max_epochs=10)
    if kind.mode == "fit":
        return run_fit(config, task=kind.task, out=out, **more)
    policy = Script(e1=germinate("early", "norm"))
    return run_heuristic_episode(
        config, task=kind.task, out=out, policy=policy, baseline=False, **more
    )


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_task_is_a_full_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kind = KINDS[name]
    whole = tmp_path / "whole"
    part = tmp_path / "part"
    result = run(kind, whole)
    with pytest.raises(KeyboardInterrupt):
        run(kind, part, hub=TelemetryHub([StopAfter(5)]))
    assert [path.name for path in saved(part / "checkpoints")] == ["epoch-5.pt"]
    run(kind, part, resume=True)
    assert reported(part) == reported(whole)

    events = read_metrics(part)
    last = [event for event in events if event["event"] == "epoch"][-1]
    assert events[0]["backend"] == kind.backend or kind.backend == "eager (soft targets)"
    counted = last["validation"]["accuracy"] is not None
    assert counted == (kind.task.task_type != "regression")
    if kind.mode == "heuristic":
        assert last["slots"][0]["stage"] == "PROBATIONARY"
        assert any(event["event"] == "seed_cost" for event in events)
    assert f"{kind.task.name}, {kind.mode}" in write_report(part).read_text()

    network = load_run(part, task=kind.task)
    expected = logits_of(call(result.model.eval(), kind.inputs, {}))
    assert torch.equal(logits_of(call(network, kind.inputs, {})), expected)
