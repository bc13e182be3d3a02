"""A U-Net that does not fit, and then does: its code, its weights and its numbers stay.

The plan is made on the meta device, so the step that does not fit is never run.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

import revseg
from revseg.memory import predict


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Any network of your own; nothing here knows revseg."""

    def __init__(self, classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(double(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else nn.functional.max_pool2d(x, 2))
            maps.append(x)
        for skip, block in zip(maps[-2::-1], reversed(self.up), strict=True):
            x = block(torch.cat([skip, nn.functional.interpolate(x, scale_factor=2.0)], 1))
        return self.head(x)


def unet() -> nn.Module:
    """That of the picture: revseg memory unet_that_fits:unet --size 256x256 --budget 250MiB --picture fitted.png"""
    return UNet(5, 32, 3)


def main(size: int = 256, width: int = 16, depth: int = 3, steps: int = 3) -> float:
    """Trains some steps; returns how many times less memory a step takes than it did."""
    torch.manual_seed(0)
    net, loss = UNet(5, width, depth), nn.CrossEntropyLoss()
    shape, labels_shape = (2, 3, size, size), (2, size, size)
    example = torch.empty(shape, device="meta")
    target = torch.empty(labels_shape, dtype=torch.int64, device="meta")
    before = predict(net, example, loss, "adam", target=target).peak
    net = revseg.fit(net, example, loss, budget=int(0.75 * before), optimizer="adam", target=target)
    print(net.plan)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(steps):
        images, labels = torch.randn(shape), torch.randint(5, labels_shape)
        optimizer.zero_grad()
        value = loss(net(images), labels)
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.3f}")
    return before / net.plan.peak


if __name__ == "__main__":
    main()
