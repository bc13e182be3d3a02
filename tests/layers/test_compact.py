"""Gradients of joined maps in memory of their own: the same bits, and the whole one goes."""

import pytest
import torch
from torch import nn

from revseg.layers.recompute import Recompute
from revseg.memory.measure import peak_bytes


class Join(nn.Module):
    """Convolution, norm and activation of a map joined to itself, twice as large."""

    def __init__(self):
        super().__init__()
        self.other, self.row = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return self.row(torch.cat([x, self.other(x.detach())], 1))


class Network(nn.Module):
    """A skip that is joined; whether anybody else reads it, is asked for."""

    def __init__(self, twice):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.between, self.join, self.twice = nn.Conv2d(4, 4, 5, padding=2), Join(), twice

    def forward(self, x):
        x = self.first(x)
        return self.between(x) + self.join(x) if self.twice else self.join(x)


def trained(network, images):
    network.zero_grad()
    (network(images) ** 2).sum().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("twice", [False, True], ids=["one reader", "two readers"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_bits_are_those_of_the_plain_network(twice, memory_format):
    """Norms sum a gradient that is a view in another order than a compact one."""
    torch.manual_seed(0)
    network = Network(twice)
    images = torch.randn(2, 3, 33, 47).contiguous(memory_format=memory_format)
    plain = trained(network, images)
    network.join = Recompute(network.join, compact=True)
    for ours, theirs in zip(trained(network, images), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_the_whole_gradient_goes():
    """While the gradient of a skip waits for that of what was between, of the joined map nothing is left but it."""

    def peak(compact):
        torch.manual_seed(0)
        network = Network(twice=True)
        network.join = Recompute(network.join, compact=compact)
        network.between = nn.Sequential(
            nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)
        )  # the most is there in these
        images = torch.randn(2, 3, 64, 64)

        def step():
            (network(images) ** 2).sum().backward()
            network.zero_grad()

        step()
        return peak_bytes(step, before=step)

    assert peak(compact=True) == peak(compact=False) - 2 * 4 * 64 * 64 * 4
