"""A small chain of reversible blocks of any way, for what people do with one (`benchmarks.scenarios`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ways import EVERY

Found = dict[str, Any]


class NotOfferedError(Exception):
    """A way has nothing that the scenario asks for: neither right nor wrong."""


class Chain:
    """A small chain of one way, the same weights and data at every call.

    Args:
        way: A name in `EVERY`.
        make: Makes f or g from the channels of a stream.
        depth: The number of blocks.
        dtype: Of weights and data.
        shape: N, C, H, W of the input.
    """

    def __init__(
        self,
        way: str,
        make: Callable[[int], nn.Module] | None = None,
        depth: int = 2,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int, int, int, int] = (2, 8, 6, 10),
    ) -> None:
        torch.manual_seed(0)
        make = make or conv_norm
        pairs = [(make(shape[1] // 2), make(shape[1] // 2)) for _ in range(depth)]
        self.functions = nn.ModuleList(nn.ModuleList(pair) for pair in pairs).to(dtype)
        self.x = torch.randn(shape, dtype=dtype)
        self.way, self.pairs = way, pairs
        self.net = EVERY[way](pairs)
        torch.manual_seed(1)

    def again(self) -> None:
        """The chain once more, of functions that were changed since."""
        self.net = EVERY[self.way](self.pairs)

    def leaf(self) -> Tensor:
        return self.x.clone().requires_grad_()

    def step(self) -> Found:
        """A training step, and what it leaves behind."""
        x = self.leaf()
        loss_of(self.net(x)).backward()
        return self.left_behind(dx=x.grad)

    def left_behind(self, **more: Any) -> Found:
        """Gradients, buffers and random state, and what else a scenario saw."""
        found: Found = {f"gradient of {name}": p.grad for name, p in self.functions.named_parameters()}
        found |= {f"buffer {name}": b.clone() for name, b in self.functions.named_buffers()}
        return found | {"random state": torch.get_rng_state()} | more


def conv_norm(c: int) -> nn.Module:
    """Without batch norm, which has a scenario of its own: what is wrong there shall not hide the rest."""
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(1, c), nn.PReLU(c))


def with_batch_norm(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.PReLU(c))


def conv_tanh(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Tanh())


def with_dropout(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Dropout(0.3), nn.Tanh())


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).mean() + y.square().mean()


class Wrapped(nn.Module):
    """A chain of any way as a module, its functions under names of our own."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.functions, self.net = chain.functions, [chain.net]

    def forward(self, x: Tensor) -> Tensor:
        return self.net[0](x)  # type: ignore[no-any-return]
