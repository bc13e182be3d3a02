"""The other libraries for reversible networks, each as its documentation says to use it.

They are optional: `python -m benchmarks.peers` installs them into a folder of their own. revlib has
two more modes, which hold what they saved beyond the end of a step; its default is here.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, is_installed

Functions = list[tuple[nn.Module, nn.Module]]  # f and g of every block
Net = Callable[[Tensor], Tensor]


def memcnn(functions: Functions) -> Net:
    """The package memcnn. It empties its input until the backward pass, so it gets a copy of ours."""
    import memcnn as package  # type: ignore[import-not-found]

    blocks = [package.AdditiveCoupling(Fm=f, Gm=g) for f, g in functions]
    net = nn.Sequential(*(package.InvertibleModuleWrapper(block, keep_input=False) for block in blocks))
    return lambda x: net(x.clone())


def revtorch(functions: Functions) -> Net:
    """The package revtorch, one sequence of blocks."""
    import revtorch as package  # type: ignore[import-not-found]

    blocks = nn.ModuleList(package.ReversibleBlock(f, g, split_along_dim=1) for f, g in functions)
    net: Net = package.ReversibleSequence(blocks)
    return net


def revlib(functions: Functions) -> Net:
    """The package revlib, one sequence of half blocks."""
    import revlib as package  # type: ignore[import-not-found]

    net: Net = package.ReversibleSequential(*(half for pair in functions for half in pair), split_dim=1)
    return net


def invtorch(functions: Functions) -> Net:
    """The package invtorch, a module of its own for each block: its own sequence saves nothing. It has no coupling."""
    from invtorch.nn import Module  # type: ignore[import-not-found]

    class Block(Module):  # type: ignore[misc]
        def __init__(self, f: nn.Module, g: nn.Module) -> None:
            super().__init__()
            self.f, self.g = f, g

        def function(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1 = x1 + self.f(x2)
            return y1, x2 + self.g(y1)

        def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            x2 = y2 - self.g(y1)
            return y1 - self.f(x2), x2

    return _Pairs(Block(f, g) for f, g in functions)


class _Pairs(nn.ModuleList):
    """Blocks of a pair of streams each, between tensors."""

    def forward(self, x: Tensor) -> Tensor:
        # Its backward frees what the streams hold, so they are no views of the caller's tensor.
        x1, x2 = (stream.clone() for stream in x.chunk(2, 1))
        for block in self:
            x1, x2 = block(x1, x2)
        return torch.cat([x1, x2], 1)


def freia(functions: Functions) -> Net:
    """The package FrEIA, which inverts but does not save memory."""
    from FrEIA.modules import NICECouplingBlock  # type: ignore[import-not-found]

    blocks = []
    for f, g in functions:
        made = iter((f, g))  # a block asks for its F, then for its G
        c = 2 * next(p.shape[0] for p in f.parameters())
        blocks.append(
            NICECouplingBlock([(c, 1, 1)], subnet_constructor=lambda _in, _out, made=made: next(made))
        )
    net = nn.ModuleList(blocks)

    def run(x: Tensor) -> Tensor:
        for block in net:
            (x,), _ = block([x], jac=False)
        return x

    return run


def torch_remat(functions: Functions) -> Net:
    """The package torch-remat, a region for each block, in which nothing is saved."""
    from torch_remat import checkpoint  # type: ignore[import-not-found]

    def block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + f(x2)
        return y1, x2 + g(y1)

    def net(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for i, (f, g) in enumerate(functions):
            x1, x2 = checkpoint(region_name=f"block {i}")(block)(f, g, x1, x2)
        return torch.cat([x1, x2], 1)

    return net


class _Both(nn.Module):
    """f and g side by side, each on its half of the channels."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        return torch.cat([self.f(x1), self.g(x2)], 1)


GAMMA = 0.9  # how much of its velocity a momentum network keeps, as the documentation of momentumnet has it


def momentumnet(functions: Functions) -> Net:
    """The package momentumnet, a momentum network of the same functions side by side, in its reversible mode."""
    from momentumnet import MomentumNet  # type: ignore[import-not-found]

    net: Net = MomentumNet([_Both(f, g) for f, g in functions], gamma=GAMMA, use_backprop=False)
    return net


def plain_momentum(functions: Functions) -> Net:
    """The same network in ordinary autograd."""
    both = [_Both(f, g) for f, g in functions]

    def net(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in both:
            v = GAMMA * v + (1 - GAMMA) * f(x)
            x = x + v
        return x

    return net


RIVALS: dict[str, Callable[[Functions], Net]] = {
    "memcnn": memcnn,
    "revtorch": revtorch,
    "revlib": revlib,
    "invtorch": invtorch,
    "FrEIA": freia,
    "torch-remat": torch_remat,
}


def is_available(way: str) -> bool:
    """Whether the way can run here. The other libraries are optional."""
    return way not in PEERS or is_installed(way)
