"""Lightning on handwritten digits: the loss counts its own metrics, a callback logs gradients.

pip install 'esper-kernels[train,lightning]'
python examples/lightning_digits.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper_kernels.integrations.lightning import GradientStatistics
from esper_kernels.integrations.torchmetrics import MeterMetric
from esper_train import get_task


class Digits(lightning.LightningModule):
    """A perceptron for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.train_accuracy = MeterMetric()
        self.accuracy = MeterMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = self.train_accuracy.loss(self.model(inputs), targets)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        self.accuracy.update(self.model(inputs), targets)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    lightning.seed_everything(0)
    splits = get_task("digits").load()
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[GradientStatistics()],
    )
    train = DataLoader(TensorDataset(*splits.train), batch_size=64, shuffle=True)
    trainer.fit(Digits(), train, DataLoader(TensorDataset(*splits.validation), batch_size=359))
    found = trainer.callback_metrics
    print(
        f"validation accuracy {found['accuracy']:.1%}, training accuracy "
        f"{found['train_accuracy']:.1%}, last gradient norm {found['gradient_norm']:.3f}"
    )


if __name__ == "__main__":
    main()
