"""Stacks and their plain twins: the same modules, called one after another."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from revseg.layers.blocks import ConvBNAct
from revseg.layers.stack import Stack


class Plain(nn.Module):
    """The modules of a stack as PyTorch runs them."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = copy.deepcopy(stack)

    def forward(self, x):
        for module in flat(self.stack):
            x = module(x)
        return x


def flat(module):
    """The innermost modules, in order; modules of other kinds as they are."""
    if isinstance(module, Stack | ConvBNAct):
        for each in module:
            yield from flat(each)
    else:
        yield module


def layer(*channels, conv=None, bn=None, act=None, **options):
    """A `ConvBNAct` with another part in place of one of its own."""
    block = ConvBNAct(*channels, **options)
    for i, part in enumerate((conv, bn, act)):
        if part is not None:
            block[i] = part
    return block


def small_stack(dtype=torch.float64, seed=0):
    """Three layers of 8, 6, 6 and 5 channels, one with stride, parameters away from their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stack = Stack(
            layer(8, 6),
            Stack(layer(6, 6, (3, 1), dilation=2), layer(6, 5, (1, 3), stride=2, activation="relu")),
        )
        return stirred(stack).to(dtype)


def stirred(module):
    """The module with random norms and slopes."""
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, _NormBase) and each.affine:
                each.weight.normal_(1, 0.3)
                each.bias.normal_(0, 0.3)
            if isinstance(each, _NormBase) and each.running_mean is not None:
                each.running_mean.normal_(0, 0.2)
                each.running_var.uniform_(0.5, 2)
            if isinstance(each, nn.PReLU):
                each.weight.uniform_(-0.2, 0.5)
    return module


def by_name(gradients):
    """Without the prefix that a twin's parameters have."""
    return {name.removeprefix("stack."): g for name, g in gradients.items()}
