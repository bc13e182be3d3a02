"""The training step that all benchmarks share, and the ways to run it.

A chain of additive couplings on 64 channels at 128 x 256, batch 2, as in the early stages of a
network for street scenes. Every way below computes the same function of the same weights, up to
the rounding of "revseg exact"; they differ in what they keep for the backward pass.

The caller holds what a network around the chain would hold: the input x and its gradient, the
output y, the gradient dy that the head sends back, parameters and their gradients. All but y exist
before the step, so a measurement counts y and whatever the way itself needs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revseg import AdditiveCoupling, ReversibleSequence
from revseg.stack import Stack

PEERS = Path(__file__).parent / ".peers"  # filled by `python -m benchmarks.peers`
SHAPE = (2, 64, 128, 256)

Functions = list[tuple[nn.Module, nn.Module]]  # f and g of every block


@dataclass
class Workload:
    """One training step: `net(x)`, then its backward from dy, gradients added to those there.

    Args:
        net: The chain.
        functions: f and g of each block, whose parameters `net` trains.
        x: The input [N, C, H, W], with a gradient.
        dy: The gradient of the loss with respect to the output [N, C, H, W].
    """

    net: Callable[[Tensor], Tensor]
    functions: nn.ModuleList
    x: Tensor
    dy: Tensor

    def forward(self) -> Tensor:
        """The output [N, C, H, W], with its graph."""
        return self.net(self.x)

    def step(self) -> None:
        """Runs forward and backward; the output is held until the end, as a head holds it."""
        y = self.forward()
        torch.autograd.backward(y, self.dy)


def workload(
    way: str,
    depth: int,
    function: str = "conv pair",
    shape: tuple[int, int, int, int] = SHAPE,
    device: str = "cpu",
    seed: int = 0,
) -> Workload:
    """The step of one way, the same weights and data at every call.

    Args:
        way: A name in `WAYS`.
        depth: The number of blocks, each with an f and a g.
        function: A name in `FUNCTIONS`, for f and g.
        shape: N, C, H, W of the input; C even.
        device: Where it runs.
        seed: Of weights and data.
    """
    torch.manual_seed(seed)
    make, channels = FUNCTIONS[function], shape[1] // 2
    pairs = [(make(channels), make(channels)) for _ in range(depth)]
    functions = nn.ModuleList(nn.ModuleList(pair) for pair in pairs).to(device)
    x = torch.randn(shape).to(device).requires_grad_()
    dy = torch.randn(shape).to(device)
    for tensor in (x, *functions.parameters()):
        tensor.grad = torch.zeros_like(tensor)
    return Workload(WAYS[way](pairs), functions, x, dy)


# --- the functions in the couplings: channels to module ------------------------------------------


def conv_pair(c: int) -> nn.Module:
    """The function of the main workload: two asymmetric convolutions, 3x1 and 1x3."""
    return nn.Sequential(
        nn.Conv2d(c, c, (3, 1), padding=(1, 0)), nn.BatchNorm2d(c), nn.PReLU(c),
        nn.Conv2d(c, c, (1, 3), padding=(0, 1)), nn.BatchNorm2d(c), nn.PReLU(c),
    )  # fmt: skip


def conv3x3(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))


def separable(c: int) -> nn.Module:
    """A depthwise convolution, then one across channels."""
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
        nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
    )  # fmt: skip


class ChannelAttention(nn.Module):
    """Attention over channels: each output channel is a weighted mean of all value channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # [N, C, H * W] each
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)  # [N, C, C]
        y: Tensor = (weights @ v).view_as(x)
        return y


def mlp(c: int) -> nn.Module:
    """A multi-layer perceptron on each pixel."""
    return nn.Sequential(nn.GroupNorm(1, c), nn.Conv2d(c, 2 * c, 1), nn.GELU(), nn.Conv2d(2 * c, c, 1))


FUNCTIONS: dict[str, Callable[[int], nn.Module]] = {
    "conv pair": conv_pair,
    "conv 3x3": conv3x3,
    "separable": separable,
    "channel attention": ChannelAttention,
    "mlp": mlp,
}


# --- the ways: functions of the blocks to chain --------------------------------------------------


def _sequence(functions: Functions, **options: Any) -> ReversibleSequence:
    return ReversibleSequence([AdditiveCoupling(f, g) for f, g in functions], **options)


def stacked(functions: Functions) -> Functions:
    """The same modules, each function as a Stack."""
    return [(_stack(f), _stack(g)) for f, g in functions]


def _stack(f: nn.Module) -> Stack:
    return Stack(*f) if isinstance(f, nn.Sequential) else Stack(f)


def plain(functions: Functions) -> Callable[[Tensor], Tensor]:
    """Ordinary autograd, without any of our code: every activation is stored."""

    def net(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for f, g in functions:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return torch.cat([x1, x2], 1)

    return net


def checkpointed(functions: Functions) -> Callable[[Tensor], Tensor]:
    """torch.utils.checkpoint of each block: the input of every block is stored."""
    blocks = [AdditiveCoupling(f, g) for f, g in functions]

    def net(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for block in blocks:
            x1, x2 = checkpoint(block, x1, x2, use_reentrant=False)
        return torch.cat([x1, x2], 1)

    return net


def memcnn(functions: Functions) -> Callable[[Tensor], Tensor]:
    """The package memcnn. It empties its input until the backward pass, so it gets a copy of ours."""
    import memcnn as package  # type: ignore[import-not-found]

    blocks = [package.AdditiveCoupling(Fm=f, Gm=g) for f, g in functions]
    net = nn.Sequential(*(package.InvertibleModuleWrapper(block, keep_input=False) for block in blocks))
    return lambda x: net(x.clone())


def revtorch(functions: Functions) -> Callable[[Tensor], Tensor]:
    """The package revtorch, one sequence of blocks."""
    import revtorch as package  # type: ignore[import-not-found]

    blocks = nn.ModuleList(package.ReversibleBlock(f, g, split_along_dim=1) for f, g in functions)
    net: Callable[[Tensor], Tensor] = package.ReversibleSequence(blocks)
    return net


WAYS: dict[str, Callable[[Functions], Callable[[Tensor], Tensor]]] = {
    "plain": plain,
    "revseg": _sequence,
    "revseg keep=1": lambda functions: _sequence(functions, keep=1),
    "revseg keep=half": lambda functions: _sequence(functions, keep=len(functions)),  # of 2 updates a block
    "revseg exact": lambda functions: _sequence(functions, exact=True),
    "revseg lossless": lambda functions: _sequence(functions, exact="lossless"),
    "revseg Stack": lambda functions: _sequence(stacked(functions)),
    "plain Stack": lambda functions: plain(stacked(functions)),
    "checkpoint": checkpointed,
    "memcnn": memcnn,
    "revtorch": revtorch,
}
PEER_WAYS = ("memcnn", "revtorch")


def is_available(way: str) -> bool:
    """Whether the way can run here. The other libraries are optional."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))  # last: what is installed already is not replaced
    return way not in PEER_WAYS or find_spec(way) is not None
