"""The ways to run a chain of additive couplings: plain, ours, PyTorch's own, the rivals'.

A way makes a function of the input [N, C, H, W] out of f and g of every block. All compute the same.
"""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.compiling import compiling
from benchmarks.rivals import RIVALS, Functions, Net, momentumnet, plain_momentum
from revseg import AdditiveCoupling, ReversibleSequence
from revseg.layers.stack import Stack


def plain(functions: Functions) -> Net:
    """Ordinary autograd, without any of our code: every activation is stored."""
    return _between_pairs(functions, _block)


def _block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    x1 = x1 + f(x2)
    return x1, x2 + g(x1)


def _between_pairs(functions: Functions, block: Callable[..., tuple[Tensor, Tensor]]) -> Net:
    """Blocks that are called with f, g and two streams, between tensors."""

    def net(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for f, g in functions:
            x1, x2 = block(f, g, x1, x2)
        return torch.cat([x1, x2], 1)

    return net


# --- ours ----------------------------------------------------------------------------------------


def _sequence(functions: Functions, **options: Any) -> ReversibleSequence:
    return ReversibleSequence([AdditiveCoupling(f, g) for f, g in functions], **options)


def stacked(functions: Functions) -> Functions:
    """The same modules, each function as a Stack."""
    return [(_stack(f), _stack(g)) for f, g in functions]


def _stack(f: nn.Module) -> Stack:
    if not isinstance(f, nn.Module):  # a function that is none stays one
        return f
    return Stack(*f) if isinstance(f, nn.Sequential) else Stack(f)


# --- PyTorch's own -------------------------------------------------------------------------------


def checkpointed(functions: Functions) -> Net:
    """torch.utils.checkpoint of each block: the input of every block is stored."""
    return _between_pairs(functions, lambda *block: checkpoint(_block, *block, use_reentrant=False))  # type: ignore[no-any-return]


class _Pair(nn.Module):
    """One block, a pair of streams in, a pair out, as a row of modules needs it."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _block(self.f, self.g, *streams)


def checkpointed_by_root(functions: Functions) -> Net:
    """checkpoint_sequential in about as many segments as each has blocks."""
    blocks = nn.Sequential(*(_Pair(f, g) for f, g in functions))
    segments = round(math.sqrt(len(functions)))

    def net(x: Tensor) -> Tensor:
        return torch.cat(checkpoint_sequential(blocks, segments, x.chunk(2, 1), use_reentrant=False), 1)  # type: ignore[no-untyped-call]

    return net


def saved_on_cpu(functions: Functions) -> Net:
    """What autograd saves lies in the host's memory. On a CPU that is a copy in the same place."""
    net = plain(functions)

    def run(x: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=x.is_cuda):
            return net(x)

    return run


def compiled(functions: Functions, budget: float) -> Net:
    """torch.compile of the blocks.

    Args:
        functions: f and g of every block.
        budget: The share of activations that its partitioner may keep; 1 is its default.
    """
    own = FunctionType(
        _block.__code__.replace(), _block.__globals__
    )  # what is compiled is kept by code object
    net = _between_pairs(functions, torch.compile(own, dynamic=False))

    def run(x: Tensor) -> Tensor:
        with compiling(budget):
            return net(x)

    return run


OURS: dict[str, Callable[[Functions], Net]] = {
    "revseg": _sequence,
    "revseg keep=1": lambda functions: _sequence(functions, keep=1),
    "revseg keep=half": lambda functions: _sequence(functions, keep=len(functions)),  # of 2 updates a block
    "revseg exact": lambda functions: _sequence(functions, exact=True),
    "revseg lossless": lambda functions: _sequence(functions, exact="lossless"),
    "revseg Stack": lambda functions: _sequence(stacked(functions)),
    "plain Stack": lambda functions: plain(stacked(functions)),
}
PYTORCH: dict[str, Callable[[Functions], Net]] = {
    "checkpoint": checkpointed,
    "checkpoint sqrt": checkpointed_by_root,
    "save_on_cpu": saved_on_cpu,
    "compile": lambda functions: compiled(functions, 1.0),
    "compile budget 0": lambda functions: compiled(functions, 0.0),
}
WAYS: dict[str, Callable[[Functions], Net]] = {"plain": plain, **OURS, **PYTORCH, **RIVALS}
# Momentum networks are others than the chain: those of momentumnet are held against plain ones.
EVERY = WAYS | {"momentumnet": momentumnet, "plain momentum": plain_momentum}
TWINS = {"momentumnet": "plain momentum"}
