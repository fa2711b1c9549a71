"""`train.measures`: what the loop, the events and the report say of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from esper_train.cli import main
from esper_train.train.config import MeasuresConfig, TrainConfig
from esper_train.train.loop import evaluate

ALL = MeasuresConfig(per_class=3, confusion=True, calibration_bins=4, entropy=True)


def test_evaluation_measures_and_variants_do_not() -> None:
    model = nn.Linear(2, 3)
    inputs = torch.randn(20, 2)
    targets = torch.arange(20) % 3
    config = TrainConfig(measures=ALL)
    result = evaluate(model, [(inputs, targets)] * 2, config, task_type="classification")
    measured = result.measured
    assert measured.per_class is not None
    assert measured.confusion is not None
    assert measured.nll == pytest.approx(result.loss)
    assert measured.per_class.support == (14, 14, 12)
    assert sum(map(sum, measured.confusion)) == 40
    assert sum(measured.per_class.correct) == result.correct[1]
    plain = evaluate(model, [(inputs, targets)], TrainConfig(), task_type="classification")
    assert plain.measured.per_class is None
    assert plain.measured.nll is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.measures.confusion needs .*\[1, 1024\], got 0"):
        MeasuresConfig(confusion=True)
    model = nn.Linear(2, 3)
    batches = [(torch.zeros(1, 2), torch.tensor([0]))]
    config = TrainConfig(measures=MeasuresConfig(per_class=4))
    with pytest.raises(ValueError, match="expected logits of 4 classes"):
        evaluate(model, batches, config, task_type="classification")
    with pytest.raises(ValueError, match="task type 'regression' has none"):
        evaluate(model, batches, config, task_type="regression", criterion=lambda x, y: x.mean())


@pytest.mark.parametrize("mode", ["fit"])
def test_a_run_writes_and_draws_them(mode: str, tmp_path: Path) -> None:
    flags = "--train.measures.per-class 10 --train.measures.confusion "
    flags += "--train.measures.calibration-bins 10 --train.measures.entropy"
    run = tmp_path / "run"
    quick = f"{mode} --task digits --max-epochs 2 --max-batches 4 --out {run} {flags}"
    assert main(quick.split()) == 0
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [e for e in map(json.loads, lines) if e["event"] == "epoch"]
    for part in ("train", "validation"):
        measures = epochs[-1][part]["measures"]
        assert len(measures["per_class"]["support"]) == 10
        assert sum(measures["per_class"]["support"]) == epochs[-1][part]["valid"]
        assert sum(measures["calibration"]["rows"]) == epochs[-1][part]["valid"]
        assert measures["nll"] == pytest.approx(epochs[-1][part]["loss"])
        assert 0 <= measures["calibration"]["ece"] <= 1
    page = (run / "report.html").read_text(encoding="utf-8")
    for title in ("Reliability: ", "Recall, precision", "Confusion matrix: ", "macro F1"):
        assert title in page
