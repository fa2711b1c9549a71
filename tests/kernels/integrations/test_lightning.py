"""Lightning and Fabric with our loss, metric and gradient statistics, on digits."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper_kernels import Meter, cross_entropy, cross_entropy_step

pytestmark = [
    pytest.mark.slow,  # lightning takes seconds to import
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


@pytest.fixture(autouse=True)
def needs_lightning() -> None:
    pytest.importorskip("lightning", reason="needs the extra lightning")


def digits() -> DataLoader[Any]:
    """20 batches of 32 rows, of which the last has 30."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    inputs = torch.tensor(images[:638], dtype=torch.float32) / 16
    return DataLoader(TensorDataset(inputs, torch.tensor(targets[:638])), batch_size=32)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def lightning_run(directory: Path, ours: bool) -> tuple[list[dict[str, float]], nn.Module]:
    """The log of a run over the digits, and its network."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from esper_kernels.integrations.lightning import GradientStatistics
    from esper_kernels.integrations.torchmetrics import MeterMetric

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()
            self.metric = MeterMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            logits = self.model(inputs)
            if ours:
                loss = self.metric.loss(logits, targets)
                self.log("accuracy", self.metric, on_step=False, on_epoch=True)
            else:
                loss = F.cross_entropy(logits, targets)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(directory, name=str(ours)),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GradientStatistics()] if ours else [],
    )
    trainer.fit(module, digits())
    assert trainer.log_dir is not None
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    entries = [{name: float(text) for name, text in line.items() if text} for line in lines]
    return entries, module.model


def test_lightning_trains_and_logs_as_with_torch(tmp_path: Path) -> None:
    (ours, model), (theirs, reference) = (lightning_run(tmp_path, ours) for ours in (True, False))
    losses = [entry["loss"] for entry in ours if "loss" in entry]
    assert len(losses) == 20
    assert losses == pytest.approx([e["loss"] for e in theirs if "loss" in e], abs=1e-5)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)

    right = []
    norms = []
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in digits():
        logits = model(inputs)
        right.append(logits.argmax(1) == targets)
        optimizer.zero_grad()
        F.cross_entropy(logits, targets).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
    accuracy = torch.cat(right).double().mean().item()
    assert [e["accuracy"] for e in ours if "accuracy" in e] == pytest.approx([accuracy], rel=1e-6)
    logged = [e["gradient_norm"] for e in ours if "gradient_norm" in e]
    assert logged == pytest.approx(norms, rel=1e-3)
    assert {e["gradient_nans"] for e in ours if "gradient_nans" in e} == {0}


@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_fabric_trains_as_with_torch(form: str) -> None:
    """Its `backward` takes a loss, and also logits with their gradient."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    meter = Meter(fabric.device)
    weights = []
    for ours in (True, False):
        module = classifier()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for inputs, targets in fabric.setup_dataloaders(digits()):
            logits = model(inputs)
            optimizer.zero_grad()
            if not ours:
                fabric.backward(F.cross_entropy(logits, targets))
            elif form == "loss":
                fabric.backward(cross_entropy(logits, targets, meter=meter))
            else:
                fabric.backward(logits, cross_entropy_step(logits, targets, meter))
            optimizer.step()
        weights.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
    assert meter.compute().valid == 638
