"""Tools that follow source code or symbols are told what to use instead."""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, Recompute, ReversibleSequence, Stack
from revseg.layers.blocks import ConvBNAct
from revseg.layers.conv_pool import ImageConvPool
from revseg.models.cgnet import CGNet

MODULES = {
    "sequence": lambda: ReversibleSequence(AdditiveCoupling(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))),
    "stack": lambda: Stack(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
    "layer": lambda: ConvBNAct(8, 8),
    "images": lambda: ImageConvPool(3, 8),
    "recomputed": lambda: Recompute(nn.Conv2d(8, 8, 1)),
    "a network": lambda: CGNet(3, blocks=(2, 2)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (torch.fx.symbolic_trace, r"torch\.fx\.symbolic_trace follows no branches"),
        (torch.jit.script, r"torch\.jit\.script cannot compile \w+"),
    ],
    ids=["symbolic_trace", "script"],
)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_the_message_names_the_tools_that_work(kind, inside, tool, reason):
    module = MODULES[kind]()
    module = nn.Sequential(module) if inside else module
    for each in (module.eval(), module.train()):
        with pytest.raises(TypeError, match=rf"{reason}.* torch\.export\.export.* and torch\.jit\.trace"):
            tool(each)


def test_they_work():
    x = torch.randn(2, 8, 5, 4)
    for kind in ("sequence", "stack", "layer", "recomputed"):
        module = MODULES[kind]().eval()
        for follow in (lambda m: torch.jit.trace(m, x), lambda m: torch.export.export(m, (x,)).module()):
            torch.testing.assert_close(follow(module)(x), module(x))
