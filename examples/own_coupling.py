"""A coupling of one's own with a parameter: ReZero, y = x + a h, whose a starts small and learns."""

import torch
from torch import Tensor, nn

from revseg import Coupling, ReversibleSequence
from revseg.testing import check


class ReZero(Coupling):
    """Bachlechner et al., ReZero is All You Need, arXiv:2003.04887."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__(f, g)
        self.a = nn.Parameter(torch.tensor(0.1))

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return x + self.a * h

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        return y - self.a * h


def function(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def main(size: int = 32, depth: int = 4, steps: int = 5) -> list[float]:
    """Trains some steps, and returns what each block's parameter became."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, size, size)
    check(ReZero(function(4), function(4)), x)  # says in one sentence what is wrong, or nothing
    body = ReversibleSequence([ReZero(function(4), function(4)) for _ in range(depth)])
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        value = (body(x) - 1).square().mean()
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.3f}")
    return [block.a.item() for block in body.blocks]


if __name__ == "__main__":
    print(main())
