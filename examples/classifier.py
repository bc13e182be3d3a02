"""A ResNet-like classifier whose stages keep two maps each, however deep they are.

The conversion changes the architecture: do it before training, or train further after it.
"""

import torch
from torch import Tensor, nn

import revseg
from revseg.memory import saved_bytes


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def classifier(classes: int, width: int, depth: int) -> nn.Sequential:
    stages: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for i in range(2):
        channels = width * 2**i
        stages.append(nn.Sequential(*(Block(channels) for _ in range(depth))))
        stages.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def main(size: int = 32, width: int = 16, depth: int = 6, steps: int = 5) -> float:
    """Trains some steps; returns how many times less the forward pass saves."""
    torch.manual_seed(0)
    plain, loss = classifier(10, width, depth), nn.CrossEntropyLoss()
    net, chains = revseg.reversible(plain, torch.randn(2, 3, size, size))
    print("reversible:", chains)
    images, labels = torch.randn(8, 3, size, size), torch.randint(10, (8,))
    before, after = (saved_bytes(lambda each=each: each(images)) for each in (plain, net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(net(images), labels)
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.3f}")
    return before / after


if __name__ == "__main__":
    print(f"{main():.1f} times less is saved")
