"""The training step that all benchmarks share, and the ways to run it.

A chain of additive couplings on 64 channels at 128 x 256, batch 2, as in the early stages of a
network for street scenes. Every way below computes the same function of the same weights, up to
the rounding of "revseg exact"; they differ in what they keep for the backward pass.

The caller holds what a network around the chain would hold: the input x and its gradient, the
output y, the gradient dy that the head sends back, parameters and their gradients. All but y exist
before the step, so a measurement counts y and whatever the way itself needs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.functions import FUNCTIONS
from benchmarks.ways import EVERY

SHAPE = (2, 64, 128, 256)


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
    layout: torch.memory_format = torch.contiguous_format,
) -> Workload:
    """The step of one way, the same weights and data at every call.

    Args:
        way: A name in `EVERY`.
        depth: The number of blocks, each with an f and a g.
        function: A name in `FUNCTIONS`, for f and g.
        shape: N, C, H, W of the input; C even.
        device: Where it runs.
        seed: Of weights and data.
        layout: In memory, of x, dy and the weights of convolutions.
    """
    torch.manual_seed(seed)
    make, channels = FUNCTIONS[function], shape[1] // 2
    pairs = [(make(channels), make(channels)) for _ in range(depth)]
    functions = nn.ModuleList(nn.ModuleList(pair) for pair in pairs).to(device)
    functions.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(shape).to(device).contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn(shape).to(device).contiguous(memory_format=layout)
    for tensor in (x, *functions.parameters()):
        tensor.grad = torch.zeros_like(tensor)
    return Workload(EVERY[way](pairs), functions, x, dy)
