"""Batch norm becomes part of the convolution before it, and nothing else changes."""

import pytest
import torch
from torch import nn

from revseg.inference.folded import folded


def stirred(network):
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.double()


@pytest.mark.parametrize(
    ("conv", "bn", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 7)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 6, 7)),
        (nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), (2, 4, 5, 6)),
    ],
)
def test_every_kind_of_convolution(conv, bn, shape):
    network = stirred(nn.Sequential(conv, bn, nn.PReLU()))
    before, x = (
        {name: t.clone() for name, t in network.state_dict().items()},
        torch.randn(shape, dtype=torch.float64),
    )
    found = folded(network)
    assert isinstance(found[1], nn.Identity)
    torch.testing.assert_close(found(x), network.eval()(x))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_what_cannot_be_folded_stays():
    free = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert isinstance(folded(free)[1], nn.BatchNorm2d)
    hooked = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda *_: None)
    assert isinstance(folded(hooked)[1], nn.BatchNorm2d)
    between = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    assert isinstance(folded(between)[2], nn.BatchNorm2d)
