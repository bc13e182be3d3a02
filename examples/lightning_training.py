"""A reversible network in Lightning: its trainer, its checkpoints, our network, data and loss.

    pip install lightning

The step of `revseg train` is yours to leave: nothing of the memory that is saved depends on it.
"""

from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from revseg import create_model
from revseg.data import create_dataset
from revseg.losses import UpsampleCrossEntropy


class Segmentation(lightning.LightningModule):
    """VNet, or any network of `revseg.list_models()`, with the loss that never makes full-size logits."""

    def __init__(self, name: str = "vnet", classes: int = 19, **options: object) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = create_model(name, classes, **options)
        self.loss = UpsampleCrossEntropy()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        value: Tensor = self.loss(self.network(images), labels)
        self.log("loss", value, prog_bar=True)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(
    size: tuple[int, int] = (128, 256), samples: int = 16, epochs: int = 2, folder: str = "runs/lightning"
) -> nn.Module:
    """Trains on generated scenes; returns the network, read back from Lightning's checkpoint."""
    lightning.seed_everything(0, verbose=False)
    scenes = create_dataset("synthetic", split="train", size=size, samples=samples)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, logger=False, log_every_n_steps=1)
    trainer.fit(Segmentation(widths=(8, 16, 32)), DataLoader(scenes, batch_size=2, shuffle=True))
    (checkpoint,) = Path(folder).rglob(f"epoch={epochs - 1}*.ckpt")
    trained = Segmentation.load_from_checkpoint(checkpoint)
    print(f"loss {trainer.callback_metrics['loss']:.3f}, saved as {checkpoint}")
    return trained.network


if __name__ == "__main__":
    main()
