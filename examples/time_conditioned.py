"""A denoiser whose reversible blocks are told the time: a side input, to which gradients flow.

`body(x, embedding)` calls every function as `f(x, embedding)` and keeps the embedding once for all blocks.
"""

import torch
from torch import Tensor, nn

from revseg import AdditiveCoupling, ReversibleSequence


class Conditioned(nn.Module):
    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(features, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, 1)
        return self.conv(nn.functional.silu(self.norm(x) * (1 + scale) + shift))


class Denoiser(nn.Module):
    def __init__(self, channels: int, depth: int, features: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, features), nn.SiLU(), nn.Linear(features, features))
        self.first, self.last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        half = channels // 2
        self.body = ReversibleSequence(
            [AdditiveCoupling(Conditioned(half, features), Conditioned(half, features)) for _ in range(depth)]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(self.body(self.first(x), self.time(time[:, None])))


def main(size: int = 32, channels: int = 16, depth: int = 6, steps: int = 5) -> Denoiser:
    """Trains some steps, and returns the network with the gradients of the last."""
    torch.manual_seed(0)
    net = Denoiser(channels, depth)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        images, noise, time = torch.randn(4, 3, size, size), torch.randn(4, 3, size, size), torch.rand(4)
        mix = time[:, None, None, None]
        optimizer.zero_grad()
        value = nn.functional.mse_loss(net((1 - mix) * images + mix * noise, time), noise - images)
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.3f}")
    return net


if __name__ == "__main__":
    main()
