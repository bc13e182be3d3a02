"""A reversible network in a loop of Accelerate: one process or many, mixed precision, gradient accumulation.

    pip install accelerate
    accelerate launch examples/accelerate_training.py

Under mixed precision the streams stay float32 and the convolutions take the short type, as autocast has it.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from revseg import create_model
from revseg.data import create_dataset
from revseg.losses import UpsampleCrossEntropy


def main(
    size: tuple[int, int] = (128, 256), samples: int = 16, epochs: int = 2, mixed_precision: str = "bf16"
) -> nn.Module:
    """Trains on generated scenes, and returns the network."""
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    network = create_model("vnet", 19, widths=(8, 16, 32))
    scenes = create_dataset("synthetic", split="train", size=size, samples=samples)
    network, optimizer, loader = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), lr=1e-3),
        DataLoader(scenes, batch_size=2, shuffle=True),
    )
    loss = UpsampleCrossEntropy()
    for epoch in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(network):
                value = loss(network(images), labels)
                accelerator.backward(value)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {value.item():.3f}")
    return accelerator.unwrap_model(network)


if __name__ == "__main__":
    main()
