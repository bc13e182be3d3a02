"""One image of 66 megapixels, trained whole: VNet by bands, batch norm in training mode, loss at full size.

    python examples/one_large_image.py --size 8192 8192
    python examples/one_large_image.py --size 2048 2048 --compare

Plain PyTorch would keep 36 GiB for this step. `memory="least"` takes every map by bands of rows, exactly: with `--compare` the
gradients are held against those of the same network by ordinary autograd on whole maps, at a size that still fits.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from revseg import create_model
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes

CLASSES = 19


def scene(size: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fields of one class each, seen from above: an image [1, 3, H, W] and its labels [1, H, W], bytes.

    A pixel has the colour of its class, and noise.
    """
    height, width = size
    numbers = torch.Generator().manual_seed(seed)
    fields = torch.randint(0, CLASSES, (height // 64 + 1, width // 64 + 1), generator=numbers)
    colours = torch.randint(32, 224, (CLASSES, 3), generator=numbers)
    labels = torch.empty(1, height, width, dtype=torch.uint8)
    image = torch.empty(1, 3, height, width, dtype=torch.uint8)
    columns = torch.arange(width)
    for row in range(height):  # at no time more than a row in float
        waves = (columns + 12 * torch.sin(torch.tensor(row / 40.0))).clamp(0, width - 1).long() // 64
        labels[0, row] = fields[row // 64, waves]
        noise = torch.randint(-30, 31, (3, width), generator=numbers)
        image[0, :, row] = (colours[labels[0, row].long()].T + noise).to(torch.uint8)
    return image, labels


def main(size: Sequence[int] = (8192, 8192), steps: int = 2) -> tuple[int, list[float]]:
    """Trains for some steps; the peak of a step in bytes, image and labels counted, and the losses."""
    torch.manual_seed(0)
    network, loss = create_model("vnet", CLASSES, memory="least"), UpsampleCrossEntropy()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses: list[float] = []

    def step() -> None:
        image, labels = scene(size)
        value = loss(network(image), labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)

    peak = peak_bytes(step)
    print(f"peak of the step: {peak / 2**20:,.0f} MiB for {size[0]} x {size[1]} pixels")
    for _ in range(steps - 1):
        step()
    return peak, losses


def compare(size: Sequence[int]) -> float:
    """How far the gradients of a step are from those of whole maps, as one vector, by the length of these."""
    image, labels = scene(size)
    found = []
    for memory in ("least", "plain"):
        torch.manual_seed(0)
        options = {"save_activations": True} if memory == "plain" else {"memory": memory}
        network = create_model("vnet", CLASSES, **options)
        UpsampleCrossEntropy()(network(image), labels).backward()
        found.append(torch.cat([p.grad.flatten().double() for p in network.parameters()]))
        del network
    ours, whole = found
    off = float((ours - whole).norm() / whole.norm())
    print(f"gradients by bands and of whole maps differ by {off:.1e} of their length")
    return off


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, nargs=2, default=(8192, 8192), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compare", action="store_true")
    given = parser.parse_args()
    if given.compare:
        compare(given.size)
    else:
        main(given.size, given.steps)
